"""The one exception that a user of the filter can cause."""


class CorpusError(ValueError):
    """The inputs or settings cannot give a corpus; the message is one sentence with the value and the remedy."""

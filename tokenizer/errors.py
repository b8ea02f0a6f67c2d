"""The one exception that a user of this package has to catch."""


class TokenizerError(ValueError):
    """A tokenizer, corpus or setting that cannot be used; the message is one sentence with the remedy."""

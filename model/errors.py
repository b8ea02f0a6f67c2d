"""The error of this package."""


class CheckpointError(ValueError):
    """A checkpoint, or its configuration, that cannot be used; the message says why and what to do."""

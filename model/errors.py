"""The errors of this package."""


class CheckpointError(ValueError):
    """A checkpoint, or its configuration, that cannot be used; the message says why and what to do."""


class GenerationError(ValueError):
    """A prompt or a setting that no text can be generated from; the message says why and what to do."""

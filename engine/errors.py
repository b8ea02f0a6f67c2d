"""Errors that a user can cause. The command line prints them as one sentence and exits with code 2."""

from __future__ import annotations

import errno

from safetensors import SafetensorError

from ..filtering.errors import CorpusError
from ..model.errors import CheckpointError, GenerationError
from ..tokenizer.errors import TokenizerError
from .multiple_choice import EvaluationDataError


class RecipeError(ValueError):
    """A recipe, or an override on the command line, that cannot be used."""


class RunError(ValueError):
    """A run folder in a state that needs the user's decision."""


class ShardError(ValueError):
    """Token shards that are missing, damaged, or made with another tokenizer."""


class DataError(ValueError):
    """Instruction or evaluation data that cannot be used."""


class TrainingError(RuntimeError):
    """Training that cannot go on, such as a loss that is no longer finite."""


USER_ERRORS = (
    CheckpointError,
    CorpusError,
    DataError,
    EvaluationDataError,
    GenerationError,
    RecipeError,
    RunError,
    ShardError,
    TokenizerError,
    TrainingError,
    SafetensorError,
)
"""Everything that is reported as one sentence instead of a traceback."""


class Interrupted(Exception):
    """Training stopped on SIGINT or SIGTERM after its state was saved."""

    def __init__(self, signal_number: int, where: str) -> None:
        super().__init__(f"stopped by signal {signal_number}; {where}; the same command goes on from there")
        self.exit_code = 128 + signal_number


class StoppedElsewhere(Exception):
    """Another process of the run has ended it, and says why."""

    def __init__(self, code: int) -> None:
        super().__init__("stopped by another process of this run")
        self.exit_code = code


def explain_os_error(error: OSError) -> str:
    """One sentence for an operating system error, with what to do where that is known."""
    name = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{name}: free some space and run the same command again, it goes on where it stopped"
    if isinstance(error, FileNotFoundError):
        return f"no such file or folder: {error.filename}"
    return f"{error.strerror or error}{name}"

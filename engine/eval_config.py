"""The [eval] section of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from .kobest import KOBEST_TASKS
from .stages import Positive

_NotNegativeInt = Annotated[int, msgspec.Meta(ge=0)]


class QAConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A set of the user's own questions, all with choices or all open."""

    data: tuple[str, ...]
    """jsonl files with `question`, `answer`, and for multiple choice `choices`."""
    grading: Literal["exact", "contains", "f1"] = "contains"
    """How an answer is compared with the reference."""
    prompt: str = "질문: {question}\n답변:"
    """Around a question with choices, and an open one where the checkpoint has no chat template."""
    max_new_tokens: Positive = 128
    """Of an answer."""

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt {self.prompt!r} must hold {{question}}, where the question goes")
        if not self.data:
            raise ValueError("data names no files")


class EvalConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the checkpoints of the run are measured on."""

    checkpoints: tuple[Literal["base", "init", "train", "sft"], ...] = ("base", "init", "train", "sft")
    """Which checkpoints; those of steps that the recipe does not have are left out."""
    others: dict[str, str] = {}
    """Checkpoint folders from outside the run by name, each with its `tokenizer.model`."""
    documents: Positive = 500
    """Most documents of each held-out set."""
    window: Positive = 512
    """Most tokens of context."""
    batch_size: Positive = 8
    kobest: str | None = None
    """Folder with TASK/SPLIT.tsv or .jsonl files in KoBEST's format."""
    kobest_split: str = "test"
    kobest_tasks: tuple[Literal["boolq", "copa", "hellaswag", "sentineg", "wic"], ...] = KOBEST_TASKS
    """Which tasks."""
    kobest_shots: tuple[_NotNegativeInt, ...] = (0,)
    """Numbers of solved examples before each question, drawn from the train split."""
    kobest_items: Positive | None = None
    """Only the first items of each task, for a quick look."""
    qa: dict[str, QAConfig] = {}
    """The user's own questions by name."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of the installed lm_eval package."""
    lm_eval_include: str | None = None
    """Folder with task files of your own, beside those of the package."""
    lm_eval_shots: _NotNegativeInt | None = None
    """Solved examples before each question; None for what each task asks for."""
    lm_eval_items: Positive | None = None
    """Only the first items of each task."""

    def __post_init__(self) -> None:
        for name in self.qa:
            if not re.fullmatch(r"[a-z0-9_-]+", name) or name in KOBEST_TASKS:
                raise ValueError(
                    f"qa set {name!r} must be named with a-z, 0-9, _ and - alone, and not as a KoBEST task"
                )
        for name in self.others:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in ("base", "init", "train", "sft"):
                raise ValueError(
                    f"checkpoint {name!r} of others must be named with letters, digits, ., _ and - alone, "
                    "and not as a checkpoint of the run"
                )
        if self.kobest is None:
            return
        if not (self.kobest_tasks and self.kobest_shots):
            raise ValueError("kobest_tasks and kobest_shots must not be empty; leave kobest out to measure none")
        if self.kobest_split == "train" and any(self.kobest_shots):
            raise ValueError("solved examples come from the train split, so kobest_split must be another one")

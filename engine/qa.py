"""Questions from the user's own file: multiple choice by log-likelihood, open ones by generated text and its grade."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..filtering.compression import open_decompressed
from ..model import Llama
from ..tokenizer import Tokenizer
from .chat_templates import ChatTemplate
from .conversations import Message
from .multiple_choice import EvaluationDataError, MultipleChoiceItem
from .statistics import mean_and_stderr
from .text_generation import generate_texts

Grading = Literal["exact", "contains", "f1"]


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the user's file."""

    id: str
    question: str
    context: str = ""
    """Text the question is about, put before it."""
    choices: tuple[str, ...] = ()
    """Of a multiple-choice question; empty for an open one."""
    answers: tuple[str, ...]
    """Right answers, any of which will do; for multiple choice the one choice that is right."""

    @property
    def text(self) -> str:
        """Context and question."""
        return f"{self.context}\n{self.question}" if self.context else self.question


class GradedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint answered to an open question."""

    question: Question
    answer: str
    score: float
    """0 to 1."""


def read_questions(paths: Iterable[str | Path]) -> list[Question]:
    """Read jsonl files (`.gz` and `.zst` too): one object a line with `question` and `answer`.

    `answer` is a text or a list of texts; with `choices`, it is one of them or its number from 0. `context` and `id`
    may be there; the default id is FILE:LINE.

    Raises EvaluationDataError naming the line of a row that cannot be used, or if there is no row.
    """
    questions = []
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_file():
            raise EvaluationDataError(f"there is no file {path} with questions")
        with open_decompressed(path) as (stream, _):
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    questions.append(_question(line, path.name, number))
    if not questions:
        raise EvaluationDataError(f"{', '.join(map(str, paths)) or 'the list of files'} holds no question")
    kinds = {bool(question.choices) for question in questions}
    if len(kinds) > 1:
        raise EvaluationDataError(
            f"{', '.join(map(str, paths))} mixes questions with and without choices; put them into two sets"
        )
    return questions


def _question(line: bytes, file: str, number: int) -> Question:
    place = f"{file}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, UnicodeDecodeError):
        raise EvaluationDataError(f"{place} is not JSON; write one object a line") from None
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        raise EvaluationDataError(f"{place} has no question; it needs the keys question and answer")
    choices, answer = row.get("choices") or [], row.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise EvaluationDataError(f"{place} has choices that are not a list of texts")
    if choices and isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise EvaluationDataError(f"{place} has answer {answer}, but choices 0 to {len(choices) - 1}")
        answer = choices[answer]
    given = answer if isinstance(answer, list) else [answer]
    answers = [text for text in given if isinstance(text, str) and text.strip()]
    if not answers or len(answers) < len(given):
        raise EvaluationDataError(f"{place} has answer {answer!r}; it must be a text, or a list of texts")
    if choices and (len(answers) != 1 or answers[0] not in choices):
        raise EvaluationDataError(f"{place} has answer {answer!r}, which is none of its choices")
    return Question(
        id=str(row.get("id", place)),
        question=row["question"],
        context=str(row.get("context") or ""),
        choices=tuple(choices),
        answers=tuple(answers),
    )


def choice_items(questions: Sequence[Question], prompt: str) -> list[MultipleChoiceItem]:
    """Multiple-choice questions for `log_likelihoods`; `prompt` has `{question}` where context and question go."""
    items = []
    for question in questions:
        text = prompt.replace("{question}", question.text)
        context = text.rstrip()
        lead = text[len(context) :] or " "
        choices = tuple(lead + choice for choice in question.choices)
        items.append(MultipleChoiceItem(context, choices, question.choices.index(question.answers[0])))
    return items


def answer_questions(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    grading: Grading,
    prompt: str,
    template: ChatTemplate | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> list[GradedAnswer]:
    """Greedy answers to open questions with their grades, in order.

    Args:
        model: any model of this package.
        tokenizer: the one it was trained with.
        questions: open ones.
        grading: see `grade`.
        prompt: with `{question}` where context and question go; not used with a chat template. The answer then ends
            at the first line break.
        template: the model's chat template, which asks the question as a user's message.
        max_new_tokens: of an answer; a question too long for it and the context loses its beginning.
        batch_size: questions answered at a time, of similar length.
    """
    room = min(max_new_tokens, model.config.context_length - 1)
    bos = [tokenizer.bos_id] * (tokenizer.bos_id >= 0)
    prompts = []
    for question in questions:
        if template is not None:
            ids = template.prompt_ids([Message("user", question.text)])
        else:
            ids = [*bos, *tokenizer.encode(prompt.replace("{question}", question.text).rstrip())]
        prompts.append(ids[-(model.config.context_length - room) :])
    texts = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda place: -len(prompts[place]))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        answers = generate_texts(
            model,
            tokenizer,
            [prompts[place] for place in batch],
            stop=() if template is not None else ("\n",),
            ends=template.stop_ids if template is not None else (),
            answer=template is not None,
            max_new_tokens=room,
        )
        for place, text in zip(batch, answers, strict=True):
            texts[place] = text.strip()
    return [
        GradedAnswer(question=question, answer=text, score=grade(text, question.answers, grading))
        for question, text in zip(questions, texts, strict=True)
    ]


def grade(answer: str, references: Sequence[str], grading: Grading) -> float:
    """The best score of an answer against any reference, from 0 to 1.

    Case, punctuation, Unicode form and spacing do not count. "exact": both are the same; "contains": the reference
    is part of the answer; "f1": harmonic mean of precision and recall over characters, as KorQuAD 1.0 grades
    (Lim et al. 2019, arXiv 1909.07005).
    """
    return max(_score(_normalised(answer), _normalised(reference), grading) for reference in references)


def _score(answer: str, reference: str, grading: Grading) -> float:
    if grading == "exact":
        return float(answer == reference)
    if grading == "contains":
        # A number is not found inside another one.
        before = r"(?<![\d.])" if reference[:1].isdigit() else ""
        behind = r"(?!\.?\d)" if reference[-1:].isdigit() else ""
        return float(re.search(before + re.escape(reference) + behind, answer) is not None)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else float(answer == reference)


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFC", text).casefold()
    # A sign before a digit is part of a number (-5, 1.5), the comma within one is not.
    kept = [
        character
        for character, following in zip(text, f"{text[1:]} ", strict=False)
        if character == "%"
        or (character in ".-" and following.isdigit())
        or unicodedata.category(character)[0] not in "PC"
    ]
    return re.sub(r"\s+", "", "".join(kept)) or re.sub(r"\s+", "", text)


def graded_summary(answers: Sequence[GradedAnswer]) -> dict[str, Any]:
    """Number, mean score and its standard error."""
    score, stderr = mean_and_stderr([graded.score for graded in answers])
    return {"n": len(answers), "score": score, "stderr": stderr}

"""KoBEST v1 as lm-evaluation-harness 0.4.13 prompts and scores it: local TSV files in, accuracy and macro F1 out.

Source: Kim et al., "KOBEST: Korean Balanced Evaluation of Significant Tasks" (arXiv 2204.04541); prompts and metrics
from the harness's `kobest_*` tasks (multiple choice, zero-shot, log-likelihood of each choice).

Three things are not written in the TSV files. They were inferred from the prompts of the harness, the data card of
`skt/kobest_v1` on the hub, and the files:
- WiC: the hub's `word` is the column Target and `context_1`/`context_2` are SENTENCE1/SENTENCE2 with the brackets
  around the word kept. The prompt appends a bare `가` to the word, even where Korean would say `이`.
- The text fields keep their surrounding spaces (the harness strips COPA's question only).
- HellaSwag was written by a CSV writer: a field that holds a quotation mark is wrapped in quotes and doubles those
  inside, so it is unwrapped here. In the other files a quotation mark is only a quotation mark.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from .statistics import macro_f1, mean_and_stderr

# The harness's `target_delimiter`, put between context and choice.
_DELIMITER = " "
_NO_YES = ("아니오", "예")
_NEGATIVE_POSITIVE = ("부정", "긍정")
_FALSE_TRUE = {"false": 0, "true": 1}
_COPA_CONNECTORS = {"원인": " 왜냐하면", "결과": " 그래서"}


class EvaluationDataError(ValueError):
    """An evaluation file is missing, malformed or does not fit the scores given for it."""


class MultipleChoiceItem(msgspec.Struct, frozen=True):
    """One question: `context + choices[i]` is the text to encode, and only the tokens after `context` are scored."""

    # Never ends in whitespace: what the prompt had there opens every choice, so that word boundaries are encoded as in
    # running text.
    context: str
    # The exact continuations, delimiter included.
    choices: tuple[str, ...]
    # Index of the right choice.
    gold: int


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """Scores of one task, each a fraction in [0, 1]; standard errors are nan for a single item."""

    task: str
    n: int
    acc: float
    acc_stderr: float
    macro_f1: float
    # Accuracy when each log-likelihood is divided by its choice's characters; None where the harness has none.
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None


class _Row:
    """The fields of one TSV line by column name, with the place of the line for error messages."""

    def __init__(self, fields: dict[str, str], place: str) -> None:
        self.fields = fields
        self.place = place

    def text(self, column: str) -> str:
        value = self.fields[column]
        if not value.strip():
            raise EvaluationDataError(f"{self.place} has an empty {column} field; restore the text or delete the line")
        return value

    def label(self, column: str, labels: dict[str, int]) -> int:
        value = self.fields[column].strip()
        if value.lower() not in labels:
            raise EvaluationDataError(f"{self.place} has {column} {value!r}; it must be one of {', '.join(labels)}")
        return labels[value.lower()]


def _item(prompt: str, choices: Sequence[str], gold: int) -> MultipleChoiceItem:
    # lm_eval's TemplateLM._encode_pair moves the trailing whitespace of the context to the continuation.
    context = prompt.rstrip()
    lead = prompt[len(context) :] + _DELIMITER
    return MultipleChoiceItem(context=context, choices=tuple(lead + choice for choice in choices), gold=gold)


def _boolq(row: _Row) -> MultipleChoiceItem:
    prompt = f"{row.text('Text')} 질문: {row.text('Question')} 답변: "
    return _item(prompt, _NO_YES, row.label("Answer", _FALSE_TRUE))


def _copa(row: _Row) -> MultipleChoiceItem:
    question = row.text("question").strip()
    if question not in _COPA_CONNECTORS:
        known = " or ".join(_COPA_CONNECTORS)
        raise EvaluationDataError(f"{row.place} asks the question {question!r}; it must be {known}")
    # The connector opens with a space of its own: the harness's prompt has two.
    prompt = f"{row.text('sentence')} {_COPA_CONNECTORS[question]}"
    return _item(prompt, (row.text("1"), row.text("2")), row.label("Answer", {"1": 0, "2": 1}))


def _hellaswag(row: _Row) -> MultipleChoiceItem:
    endings = [_unquote(row.text(f"choice{i}")) for i in range(1, 5)]
    prompt = f"문장: {_unquote(row.text('context'))}"
    return _item(prompt, endings, row.label("label", {str(i): i for i in range(4)}))


def _sentineg(row: _Row) -> MultipleChoiceItem:
    return _item(f"문장: {row.text('Text')} 긍부정:", _NEGATIVE_POSITIVE, row.label("Label", {"0": 0, "1": 1}))


def _wic(row: _Row) -> MultipleChoiceItem:
    prompt = (
        f"문장1: {row.text('SENTENCE1')} 문장2: {row.text('SENTENCE2')} "
        f"두 문장에서 {row.text('Target')}가 같은 뜻으로 쓰였나?"
    )
    return _item(prompt, _NO_YES, row.label("ANSWER", _FALSE_TRUE))


def _unquote(field: str) -> str:
    if len(field) < 2 or not (field.startswith('"') and field.endswith('"')):
        return field
    inner = field[1:-1].replace('""', "\0")
    # A lone quotation mark inside means that the text itself begins and ends with one.
    return field if '"' in inner else inner.replace("\0", '"')


_TASKS: dict[str, tuple[tuple[str, ...], Callable[[_Row], MultipleChoiceItem]]] = {
    "boolq": (("Text", "Question", "Answer"), _boolq),
    "copa": (("sentence", "question", "1", "2", "Answer"), _copa),
    "hellaswag": (("context", "choice1", "choice2", "choice3", "choice4", "label"), _hellaswag),
    "sentineg": (("Text", "Label"), _sentineg),
    "wic": (("Target", "SENTENCE1", "SENTENCE2", "ANSWER"), _wic),
}
KOBEST_TASKS = ("boolq", "copa", "hellaswag", "sentineg", "wic")
# The text columns of the hub's data set and ours, then our column of the label and its values.
_HUB_COLUMNS: dict[str, tuple[dict[str, str], str, dict[str, int]]] = {
    "boolq": ({"paragraph": "Text", "question": "Question"}, "Answer", _FALSE_TRUE),
    "copa": (
        {"premise": "sentence", "question": "question", "alternative_1": "1", "alternative_2": "2"},
        "Answer",
        {"1": 0, "2": 1},
    ),
    "hellaswag": (
        {"context": "context", **{f"ending_{i}": f"choice{i}" for i in range(1, 5)}},
        "label",
        {str(i): i for i in range(4)},
    ),
    "sentineg": ({"sentence": "Text"}, "Label", {"0": 0, "1": 1}),
    "wic": ({"word": "Target", "context_1": "SENTENCE1", "context_2": "SENTENCE2"}, "ANSWER", _FALSE_TRUE),
}
# The tasks whose harness configuration also reports acc_norm.
_LENGTH_NORMALISED = frozenset({"hellaswag"})


def read_task(folder: Path, task: str, split: str = "test") -> list[MultipleChoiceItem]:
    """Read `folder/TASK/SPLIT.tsv` (TASK in any letter case, e.g. BoolQ) as prompts, choices and gold indices.

    Files are UTF-8 with or without a byte order mark, LF or CRLF, tab-separated without quoting.

    Raises EvaluationDataError if the task is unknown, the file is missing, or a line lacks a field or a known label.
    """
    columns, build = _TASKS[_known_task(task)]
    path = _find_file(Path(folder), task, split)
    return [build(row) for row in _read_rows(path, columns)]


def read_documents(folder: Path, task: str, split: str = "test") -> list[dict[str, str | int]]:
    """Read `folder/TASK/SPLIT.tsv` with the columns of `skt/kobest_v1` on the hub; errors as of `read_task`."""
    task = _known_task(task)
    columns, _ = _TASKS[task]
    rows = _read_rows(_find_file(Path(folder), task, split), columns)
    return [_document(task, row) for row in rows]


def _document(task: str, row: _Row) -> dict[str, str | int]:
    names, label, labels = _HUB_COLUMNS[task]
    unwrap = _unquote if task == "hellaswag" else str
    return {**{name: unwrap(row.text(column)) for name, column in names.items()}, "label": row.label(label, labels)}


def score(items: Sequence[MultipleChoiceItem], loglikelihoods: Sequence[Sequence[float]], *, task: str) -> TaskResult:
    """Score summed log-likelihoods (nats) as the harness does for a task of KoBEST; see `score_choices`."""
    task = _known_task(task)
    return score_choices(items, loglikelihoods, name=task, length_normalised=task in _LENGTH_NORMALISED)


def score_choices(
    items: Sequence[MultipleChoiceItem],
    loglikelihoods: Sequence[Sequence[float]],
    *,
    name: str,
    length_normalised: bool = True,
) -> TaskResult:
    """Score summed log-likelihoods (nats), one list per item and one value per choice.

    The answer is the choice of highest log-likelihood, the first one on a tie. acc_norm divides by the characters (not
    bytes) of a choice without its delimiter. Standard errors are those of a mean: sample deviation / sqrt(n).

    Raises EvaluationDataError if there are no items, or values are nan or do not fit the items.
    """
    if not items:
        raise EvaluationDataError(f"there are no {name} items to score; check that its file has lines below the header")
    if len(items) != len(loglikelihoods):
        raise EvaluationDataError(f"{name} has {len(items)} items but {len(loglikelihoods)} lists of log-likelihoods")
    for number, (item, values) in enumerate(zip(items, loglikelihoods, strict=True), start=1):
        if len(values) != len(item.choices):
            raise EvaluationDataError(
                f"{name} item {number} has {len(item.choices)} choices but {len(values)} log-likelihoods"
            )
        if any(math.isnan(value) for value in values):
            raise EvaluationDataError(f"{name} item {number} has a log-likelihood of nan; check the model's weights")
    gold = np.array([item.gold for item in items])
    predictions = choices_of(loglikelihoods)
    acc, acc_stderr = mean_and_stderr(gold == np.array(predictions))
    acc_norm = acc_norm_stderr = None
    if length_normalised:
        lengths = [[len(choice.lstrip()) for choice in item.choices] for item in items]
        divided = [np.asarray(values) / np.asarray(n) for values, n in zip(loglikelihoods, lengths, strict=True)]
        acc_norm, acc_norm_stderr = mean_and_stderr(gold == np.array(choices_of(divided)))
    return TaskResult(
        task=name,
        n=len(items),
        acc=acc,
        acc_stderr=acc_stderr,
        macro_f1=macro_f1(gold.tolist(), predictions),
        acc_norm=acc_norm,
        acc_norm_stderr=acc_norm_stderr,
    )


def choices_of(loglikelihoods: Sequence[Sequence[float] | np.ndarray]) -> list[int]:
    """The choice of highest log-likelihood of every item, the first one on a tie."""
    return [int(np.argmax(values)) for values in loglikelihoods]


def _known_task(task: str) -> str:
    if task.lower() not in _TASKS:
        raise EvaluationDataError(f"unknown KoBEST task {task!r}; choose from {', '.join(KOBEST_TASKS)}")
    return task.lower()


def _find_file(folder: Path, task: str, split: str) -> Path:
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    for child in children:
        if child.name.lower() == task.lower() and (child / f"{split}.tsv").is_file():
            return child / f"{split}.tsv"
    raise EvaluationDataError(
        f"{folder} has no {task}/{split}.tsv; point the folder at KoBEST's TSV files or leave the task out"
    )


def _read_rows(path: Path, columns: Sequence[str]) -> list[_Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationDataError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None
    # Only line feeds end a line: str.splitlines would also break at U+2028 and friends inside a field.
    lines = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
    header = [name.strip() for name in lines[0]]
    missing = [column for column in columns if column not in header]
    if missing:
        raise EvaluationDataError(f"{path} line 1 lacks the column {', '.join(missing)}; it has {', '.join(header)}")
    rows = []
    for number, fields in enumerate(lines[1:], start=2):
        if fields == [""]:
            continue
        if len(fields) != len(header):
            raise EvaluationDataError(f"{path} line {number} has {len(fields)} fields; the header has {len(header)}")
        rows.append(_Row(dict(zip(header, fields, strict=True)), f"{path} line {number}"))
    return rows

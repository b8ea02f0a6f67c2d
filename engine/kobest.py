"""KoBEST v1 as lm-evaluation-harness 0.4.13 prompts and scores it: local TSV or jsonl files in, questions out.

Source: Kim et al., "KOBEST: Korean Balanced Evaluation of Significant Tasks" (arXiv 2204.04541); prompts and metrics
from the harness's `kobest_*` tasks (multiple choice, log-likelihood of each choice).

A jsonl file has the columns of the data set `skt/kobest_v1` on the hub, the TSV files those of its authors. Three
things are not written in the TSV files. They were inferred from the prompts of the harness, the data card, and the
files:
- WiC: the hub's `word` is the column Target and `context_1`/`context_2` are SENTENCE1/SENTENCE2 with the brackets
  around the word kept. The prompt appends a bare `가` to the word, even where Korean would say `이`.
- The text fields keep their surrounding spaces (the harness strips COPA's question only).
- HellaSwag was written by a CSV writer: a field that holds a quotation mark is wrapped in quotes and doubles those
  inside, so it is unwrapped here. In the other files a quotation mark is only a quotation mark.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .multiple_choice import EvaluationDataError, MultipleChoiceItem, TaskResult, score_choices

# The harness's `target_delimiter`, put between context and choice.
_DELIMITER = " "
_NO_YES = ("아니오", "예")
_NEGATIVE_POSITIVE = ("부정", "긍정")
_COPA_CONNECTORS = {"원인": " 왜냐하면", "결과": " 그래서"}
_SUFFIXES = (".tsv", ".jsonl")

Document = dict[str, Any]
"""A question with the columns of the hub: texts, and the number `label`."""


def _item(prompt: str, choices: Sequence[str], gold: int) -> MultipleChoiceItem:
    # lm_eval's TemplateLM._encode_pair moves the trailing whitespace of the context to the continuation.
    context = prompt.rstrip()
    lead = prompt[len(context) :] + _DELIMITER
    return MultipleChoiceItem(context=context, choices=tuple(lead + choice for choice in choices), gold=gold)


def _boolq(row: Document) -> MultipleChoiceItem:
    return _item(f"{row['paragraph']} 질문: {row['question']} 답변: ", _NO_YES, row["label"])


def _copa(row: Document) -> MultipleChoiceItem:
    # The connector opens with a space of its own: the harness's prompt has two.
    prompt = f"{row['premise']} {_COPA_CONNECTORS[row['question'].strip()]}"
    return _item(prompt, (row["alternative_1"], row["alternative_2"]), row["label"])


def _hellaswag(row: Document) -> MultipleChoiceItem:
    return _item(f"문장: {row['context']}", [row[f"ending_{i}"] for i in range(1, 5)], row["label"])


def _sentineg(row: Document) -> MultipleChoiceItem:
    return _item(f"문장: {row['sentence']} 긍부정:", _NEGATIVE_POSITIVE, row["label"])


def _wic(row: Document) -> MultipleChoiceItem:
    prompt = f"문장1: {row['context_1']} 문장2: {row['context_2']} 두 문장에서 {row['word']}가 같은 뜻으로 쓰였나?"
    return _item(prompt, _NO_YES, row["label"])


class _Task(NamedTuple):
    """What the files of a task hold, and how a question is put."""

    columns: Mapping[str, str]
    """The hub's text columns, and what the TSV files call them."""
    label: str
    """What the TSV files call the label."""
    labels: tuple[str, ...]
    """What they write, in lower case, for label 0, 1, ..."""
    item: Callable[[Document], MultipleChoiceItem]
    allowed: Mapping[str, Sequence[str]] = {}
    """The only values of a text column."""
    unquote: bool = False
    """Whether a CSV writer wrote the TSV files."""
    length_normalised: bool = False
    """Whether the harness also reports acc_norm."""


_TASKS = {
    "boolq": _Task({"paragraph": "Text", "question": "Question"}, "Answer", ("false", "true"), _boolq),
    "copa": _Task(
        {"premise": "sentence", "question": "question", "alternative_1": "1", "alternative_2": "2"},
        "Answer",
        ("1", "2"),
        _copa,
        allowed={"question": tuple(_COPA_CONNECTORS)},
    ),
    "hellaswag": _Task(
        {"context": "context", **{f"ending_{i}": f"choice{i}" for i in range(1, 5)}},
        "label",
        ("0", "1", "2", "3"),
        _hellaswag,
        unquote=True,
        length_normalised=True,
    ),
    "sentineg": _Task({"sentence": "Text"}, "Label", ("0", "1"), _sentineg),
    "wic": _Task(
        {"word": "Target", "context_1": "SENTENCE1", "context_2": "SENTENCE2"}, "ANSWER", ("false", "true"), _wic
    ),
}
KOBEST_TASKS = ("boolq", "copa", "hellaswag", "sentineg", "wic")


def read_task(folder: Path, task: str, split: str = "test") -> list[MultipleChoiceItem]:
    """Read `folder/TASK/SPLIT.tsv` or `.jsonl` as prompts, choices and gold indices; errors as of `read_documents`."""
    return [_TASKS[_known_task(task)].item(document) for document in read_documents(folder, task, split)]


def read_documents(folder: Path, task: str, split: str = "test") -> list[Document]:
    """Read `folder/TASK/SPLIT.tsv` or `.jsonl` (TASK in any letter case, e.g. BoolQ) with the columns of the hub.

    TSV files are UTF-8 with or without a byte order mark, LF or CRLF, tab-separated without quoting; jsonl files hold
    an object a line. Other columns are ignored.

    Raises EvaluationDataError if the task is unknown, the file is missing, or a line lacks a field or a known label.
    """
    known = _TASKS[_known_task(task)]
    path = find_task_file(folder, task, split)
    read = _read_tsv if path.suffix == ".tsv" else _read_jsonl
    return list(read(path, known))


def find_task_file(folder: Path, task: str, split: str) -> Path:
    """The file of a split of a task, TSV before jsonl; raises EvaluationDataError where there is none."""
    folder = Path(folder)
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    for child in children:
        if child.name.lower() == task.lower():
            for suffix in _SUFFIXES:
                if (path := child / f"{split}{suffix}").is_file():
                    return path
    raise EvaluationDataError(
        f"{folder} has no {task}/{split}.tsv, and no .jsonl; point the folder at KoBEST's files or leave the task out"
    )


def score(items: Sequence[MultipleChoiceItem], loglikelihoods: Sequence[Sequence[float]], *, task: str) -> TaskResult:
    """Score summed log-likelihoods (nats) as the harness does for a task of KoBEST; see `score_choices`."""
    task = _known_task(task)
    return score_choices(items, loglikelihoods, name=task, length_normalised=_TASKS[task].length_normalised)


def _known_task(task: str) -> str:
    if task.lower() not in _TASKS:
        raise EvaluationDataError(f"unknown KoBEST task {task!r}; choose from {', '.join(KOBEST_TASKS)}")
    return task.lower()


def _read_tsv(path: Path, task: _Task) -> Iterator[Document]:
    # Only line feeds end a line: str.splitlines would also break at U+2028 and friends inside a field.
    lines = [line.removesuffix("\r").split("\t") for line in _read_text(path).split("\n")]
    header = [name.strip() for name in lines[0]]
    missing = [column for column in (*task.columns.values(), task.label) if column not in header]
    if missing:
        raise EvaluationDataError(f"{path} line 1 lacks the column {', '.join(missing)}; it has {', '.join(header)}")
    for number, fields in enumerate(lines[1:], start=2):
        if fields == [""]:
            continue
        place = f"{path} line {number}"
        if len(fields) != len(header):
            raise EvaluationDataError(f"{place} has {len(fields)} fields; the header has {len(header)}")
        row = dict(zip(header, fields, strict=True))
        document: Document = {}
        for name, column in task.columns.items():
            document[name] = _unquote(row[column]) if task.unquote else row[column]
            _check_text(document[name], column, place, task.allowed.get(name))
        label = row[task.label].strip()
        if label.lower() not in task.labels:
            raise _unknown(place, task.label, label, task.labels)
        yield {**document, "label": task.labels.index(label.lower())}


def _read_jsonl(path: Path, task: _Task) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise EvaluationDataError(f"{place} is no JSON object; write one a line")
        if missing := [name for name in (*task.columns, "label") if name not in row]:
            raise EvaluationDataError(f"{place} lacks the key {', '.join(missing)}; it has {', '.join(row)}")
        for name in task.columns:
            _check_text(row[name], name, place, task.allowed.get(name))
        if isinstance(row["label"], bool) or row["label"] not in range(len(task.labels)):
            raise _unknown(place, "label", row["label"], list(map(str, range(len(task.labels)))))
        yield {name: row[name] for name in (*task.columns, "label")}


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationDataError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None


def _check_text(value: Any, column: str, place: str, allowed: Sequence[str] | None) -> None:
    if not isinstance(value, str) or not value.strip():
        raise EvaluationDataError(f"{place} has an empty {column} field; restore the text or delete the line")
    if allowed is not None and value.strip() not in allowed:
        raise _unknown(place, column, value, allowed)


def _unknown(place: str, column: str, value: Any, known: Sequence[str]) -> EvaluationDataError:
    return EvaluationDataError(f"{place} has {column} {value!r}; it must be one of {', '.join(known)}")


def _unquote(field: str) -> str:
    if len(field) < 2 or not (field.startswith('"') and field.endswith('"')):
        return field
    inner = field[1:-1].replace('""', "\0")
    # A lone quotation mark inside means that the text itself begins and ends with one.
    return field if '"' in inner else inner.replace("\0", '"')

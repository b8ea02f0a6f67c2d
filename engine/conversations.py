"""Instruction data: rows in the shapes of messages, ShareGPT and Alpaca, out of jsonl, JSON and parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..filtering.compression import open_decompressed
from .errors import DataError

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names of ShareGPT's files for the usual roles."""


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


class BadRow(msgspec.Struct, frozen=True):
    """A row that is left out, and why."""

    file: str
    row: int
    """Counted from 1: the line of a jsonl file, the record of a JSON or parquet file."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


class Conversation(msgspec.Struct, frozen=True):
    """A usable row, and where it came from."""

    messages: tuple[Message, ...]
    file: str = ""
    row: int = 0

    def bad(self, reason: str) -> BadRow:
        """This row as one that is left out after all."""
        return BadRow(self.file, self.row, reason)


def read_conversations(paths: Sequence[str | Path]) -> tuple[list[Conversation], list[BadRow]]:
    """All usable conversations of some files, in order.

    Args:
        paths: `.jsonl`, `.json` (one array, or as jsonl) and `.parquet` files; all but the last also `.gz` and `.zst`.

    Returns:
        (conversations, bad rows): a row that cannot be used is left out and said why.

    Raises:
        DataError: if a file is missing or unreadable, or no row of all files can be used.
        CorpusError: if a compressed file is damaged, or the package that reads it is not installed.
    """
    conversations, bad = [], []
    for path in map(Path, paths):
        for number, record in _rows(path):
            problem: str | None
            if isinstance(record, _Unreadable):
                messages, problem = (), record.reason
            else:
                messages, problem = messages_of(record)
            problem = problem or problem_of(messages)
            if problem:
                bad.append(BadRow(str(path), number, problem))
            else:
                conversations.append(Conversation(messages, str(path), number))
    if not conversations:
        raise DataError(f"no usable row in {', '.join(map(str, paths))}: {bad[0] if bad else 'no rows'}")
    return conversations, bad


def messages_of(row: Any) -> tuple[tuple[Message, ...], str | None]:
    """The messages of a row in any of the three shapes.

    `messages` is a list of {role, content}; `conversations` (ShareGPT) one of {from, value}, or of {role, content};
    Alpaca has `instruction`, perhaps `input`, and `output`, and may have `system` and `history`, a list of pairs.
    Other keys are ignored.

    Returns:
        (messages, problem), of which the second is None or says why the row has none.
    """
    if not isinstance(row, dict):
        return (), "the row is not an object"
    try:
        for key in ("messages", "conversations"):
            if row.get(key) is not None:
                system = [("system", row["system"])] if row.get("system") else []
                return tuple(_message(*pair) for pair in [*system, *map(_turn, _list(row[key], key))]), None
        if row.get("instruction") is not None and "output" in row:
            return tuple(_message(*pair) for pair in _alpaca(row)), None
    except _ShapeError as error:
        return (), str(error)
    found = ", ".join(list(row)[:8]) or "none"
    return (), f"no messages, no conversations, no instruction with output; keys: {found}"


def problem_of(messages: Sequence[Message]) -> str | None:
    """Why a conversation cannot be trained on, or None: an optional system message, then user and assistant in turn."""
    roles = [message.role for message in messages]
    if strange := [role for role in roles if role not in ("system", "user", "assistant")]:
        return f"the role {strange[0]!r} is none of system, user and assistant"
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) < 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        return f"turns must alternate user, assistant and end with assistant; found {', '.join(roles) or 'none'}"
    for message in messages:
        if not message.content.strip():
            return f"a message of the {message.role} is empty"
        try:
            message.content.encode()
        except UnicodeEncodeError:
            return "a message holds half a surrogate pair, which is no Unicode text"
    return None


class _ShapeError(ValueError):
    """Why a row is not of the shape that its keys promise."""


class _Unreadable(msgspec.Struct):
    reason: str


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise _ShapeError(f"{key} is not a list")
    return value


def _turn(turn: Any) -> tuple[Any, Any]:
    if not isinstance(turn, dict):
        raise _ShapeError("a turn is not an object")
    for role, content in (("role", "content"), ("from", "value")):
        if turn.get(role) is not None and content in turn:
            return turn[role], turn[content]
    raise _ShapeError(f"a turn has neither role and content nor from and value; keys: {', '.join(turn) or 'none'}")


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or not isinstance(content, str):
        raise _ShapeError("the role or the content of a turn is not text")
    return Message(_ROLES.get(role, role), content)


def _alpaca(row: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    if row.get("system"):
        yield "system", row["system"]
    for pair in _list(row.get("history") or [], "history"):
        if len(_list(pair, "an entry of history")) != 2:
            raise _ShapeError("an entry of history is not a pair of question and answer")
        yield from zip(("user", "assistant"), pair, strict=True)
    instruction, more = row["instruction"], row.get("input")
    if isinstance(instruction, str) and isinstance(more, str) and more.strip():
        instruction = f"{instruction}\n\n{more}" if instruction.strip() else more
    yield "user", instruction
    yield "assistant", row["output"]


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, row); a row that cannot be parsed is an `_Unreadable`."""
    if not path.exists():
        raise DataError(f"instruction file {path} does not exist")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), 1)
        return
    with open_decompressed(path) as (stream, _):
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"instruction file {path} is not UTF-8 text; it should be jsonl, JSON or parquet") from None
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"instruction file {path} begins like one JSON array, but is none: {error}") from None
        return
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                row = _Unreadable(f"not JSON: {error}")
            yield number, row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f'reading {path} needs pyarrow: pip install "redwhale[filtering]"') from None
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"instruction file {path} is no readable parquet file ({error})") from None

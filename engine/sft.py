"""Instruction data: rows of messages, rendered by a chat template, with targets on the answers only.

The template is RedWhale's and EEVE's: a system sentence, then "Human:" and "Assistant:" turns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ..tokenizer import Tokenizer
from .batches import IGNORE_INDEX
from .errors import DataError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}" + SYSTEM + "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\nAssistant: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
"""The same template in Jinja, for `tokenizer_config.json`."""


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str


class Conversation(msgspec.Struct, frozen=True):
    """One row of instruction data; other keys of the row are ignored."""

    messages: list[Message]


def segments(messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
    """The conversation as (text, is_answer) pieces, in order.

    The space behind "Assistant:" belongs to the answer, where the tokenizer's own word boundary is; an
    answer is followed by the end-of-sequence token.
    """
    prompt = messages[0].content if messages[0].role == "system" else SYSTEM
    for message in messages:
        if message.role == "user":
            prompt += f"\nHuman: {message.content}"
        elif message.role == "assistant":
            yield prompt + "\nAssistant:", False
            yield message.content, True
            prompt = ""


def encode_conversation(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids and aligned targets of a conversation.

    Returns:
        (input ids, targets) of equal length: targets[i] is the token behind input i where that token
        belongs to an answer or ends one, IGNORE_INDEX everywhere else.
    """
    ids, is_target = [tokenizer.bos_id], [False]
    for text, is_answer in segments(messages):
        piece = tokenizer.encode(text) + ([tokenizer.eos_id] if is_answer else [])
        ids += piece
        is_target += [is_answer] * len(piece)
    targets = [token if counts else IGNORE_INDEX for token, counts in zip(ids[1:], is_target[1:], strict=True)]
    return ids, [*targets, IGNORE_INDEX]


def read_conversations(paths: Sequence[str | Path]) -> tuple[list[list[Message]], list[str]]:
    """All usable conversations of jsonl files.

    Returns:
        (conversations, problems): a row that cannot be used is left out and said why, with its line.

    Raises:
        DataError: if a file is missing or no row of all files can be used.
    """
    conversations, problems = [], []
    for path in paths:
        try:
            # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except FileNotFoundError:
            raise DataError(f"instruction file {path} does not exist") from None
        except UnicodeDecodeError:
            raise DataError(f"instruction file {path} is not UTF-8 text; it should be jsonl") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                messages = msgspec.convert(json.loads(line), Conversation).messages
            except (json.JSONDecodeError, msgspec.ValidationError) as error:
                problems.append(f"{path}:{number}: {error}")
                continue
            if problem := _problem(messages):
                problems.append(f"{path}:{number}: {problem}")
            else:
                conversations.append(messages)
    if not conversations:
        raise DataError(f"no usable row in {', '.join(map(str, paths))}: {problems[0] if problems else 'no rows'}")
    return conversations, problems


def _problem(messages: Sequence[Message]) -> str | None:
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) < 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        return f"turns must alternate user, assistant and end with assistant; found {', '.join(roles) or 'none'}"
    if any(not message.content.strip() for message in messages):
        return "a message is empty"
    return None


def encode_conversations(
    conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer, sequence_length: int
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Encode conversations that fit.

    Returns:
        (examples, dropped): conversations longer than `sequence_length` tokens are counted, not cut, since
        a cut would take the answer's end.

    Raises:
        DataError: if none fits.
    """
    encoded = [encode_conversation(messages, tokenizer) for messages in conversations]
    examples = [example for example in encoded if len(example[0]) <= sequence_length]
    if not examples:
        raise DataError(
            f"every conversation is longer than sequence_length = {sequence_length} tokens "
            f"(the shortest has {min(len(ids) for ids, _ in encoded)})"
        )
    return examples, len(encoded) - len(examples)

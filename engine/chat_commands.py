"""`redwhale chat`: a conversation in the terminal, and what its command and that of `serve` share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from .chat import ChatModel, Sampling
from .conversations import Message
from .device import resolve_device, resolve_precision

HELP = "/new forgets the conversation, /system TEXT begins one with these instructions, /exit or Ctrl-D leaves"


def load_chat_model(checkpoint: Path, *, template: str | None, device: str, precision: str) -> ChatModel:
    """`ChatModel.load` with device and precision as the command line spells them."""
    resolved = resolve_device(device)
    dtype = None if precision == "auto" else resolve_precision(precision, resolved)
    return ChatModel.load(checkpoint, template=template, device=resolved, dtype=dtype)


def chat(
    model: ChatModel,
    sampling: Sampling,
    *,
    system: str | None = None,
    lines: Iterator[str] | None = None,
    say: Callable[[str], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> None:
    """Hold a conversation until the lines end or one says /exit.

    Ctrl-C stops an answer, of which what was said stays in the conversation. Where the context is full the oldest
    turns are forgotten.

    Args:
        model: who answers.
        sampling: the answer to turn i is drawn with seed + i.
        system: instructions to begin with, in place of the template's own.
        lines: what the user says; by default standard input, with a prompt on a terminal.
        say: receives the pieces of answers; by default standard output.
        note: receives sentences that no one has said; by default standard error.
    """
    say = say or (lambda text: print(text, end="", flush=True))
    note = note or (lambda text: print(f"({text})", file=sys.stderr))
    messages = _beginning(system)
    for line in _typed(note) if lines is None else lines:
        said = line.strip()
        if said in ("/exit", "/quit"):
            return
        if said == "/new":
            messages = _beginning(system)
        elif said.startswith("/system "):
            system = said.removeprefix("/system ").strip()
            messages = _beginning(system)
        elif said.startswith("/"):
            note(HELP)
        elif said:
            messages.append(Message("user", said))
            context = model.model.config.context_length
            shorter = model.fitting(messages, room=min(sampling.max_new_tokens, context // 4))
            if len(shorter) < len(messages):
                note("the context is full: the oldest turns are forgotten")
            messages = shorter
            turn = sum(message.role == "user" for message in messages) - 1
            messages.append(Message("assistant", _say_answer(model, messages, sampling, turn, say)))


def _beginning(system: str | None) -> list[Message]:
    return [Message("system", system)] if system else []


def _say_answer(
    model: ChatModel, messages: list[Message], sampling: Sampling, turn: int, say: Callable[[str], None]
) -> str:
    pieces: list[str] = []
    try:
        for piece in model.answer(messages, msgspec.structs.replace(sampling, seed=sampling.seed + turn)):
            pieces.append(piece)
            say(piece)
    except KeyboardInterrupt:
        say(" …")
    say("\n")
    return "".join(pieces)


def _typed(note: Callable[[str], None]) -> Iterator[str]:
    """Lines of standard input; on a terminal, typed behind a prompt that can be edited."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401 (input() can be edited once it is imported)

    note(HELP)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return

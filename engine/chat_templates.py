"""Chat templates in Jinja, rendered as transformers renders them, and conversations as token ids.

`tokenizer_config.json` carries the template, so every tool that reads a Hugging Face folder talks to the model in the
words it was fine-tuned on.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..tokenizer import Tokenizer
from .conversations import Message
from .errors import DataError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The system sentence of RedWhale and EEVE."""

_REDWHALE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}" + SYSTEM + "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\nAssistant: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)

_CHATML = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ END if message['role'] == 'assistant' else '<|im_end|>' }}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LLAMA_2 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% set content = message['content'] %}"
    "{% if loop.first or (loop.index0 == 1 and system is not none) %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content if system is not none else content %}"
    "{% endif %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

TEMPLATES = {"redwhale": _REDWHALE, "chatml": _CHATML, "llama-2": _LLAMA_2}
"""The templates that have a name; see `template_source`."""


def template_source(name: str, tokenizer: Tokenizer) -> str:
    """The Jinja of a named template, or of a file.

    ChatML's answers end with `<|im_end|>` where that is a special piece of the tokenizer, and else with the
    end-of-text token, which every tool stops at; its other markers are then spelled out in ordinary pieces.

    Args:
        name: a key of `TEMPLATES`, or the path of a file with Jinja as transformers renders it.
        tokenizer: of the model.

    Raises:
        DataError: if there is no such name or file.
    """
    if name in TEMPLATES:
        end = "'<|im_end|>'" if "<|im_end|>" in special_pieces(tokenizer) else "eos_token"
        return TEMPLATES[name].replace("END", end)
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the chat template {name!r} is none of {', '.join(TEMPLATES)}, and no readable file "
            f"({getattr(error, 'strerror', None) or error})"
        ) from None


def stored_template(folder: Path) -> str | None:
    """The Jinja that a Hugging Face folder carries, in `chat_template.jinja` or `tokenizer_config.json`, or None.

    Raises:
        DataError: if `tokenizer_config.json` is damaged.
    """
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if alone.exists():
        return alone.read_text(encoding="utf-8")
    if not config.exists():
        return None
    try:
        stored = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{config} is damaged ({error}); copy or download it again") from None
    if isinstance(stored, list):  # several with a name each
        stored = {entry.get("name"): entry.get("template") for entry in stored}.get("default")
    return stored


def special_pieces(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the pieces that stand for no text of their own, such as `<s>`: those special in `tokenizer.json` too."""
    processor = tokenizer.processor
    indices = (i for i in range(tokenizer.vocab_size) if processor.is_control(i) or processor.is_unknown(i))
    return {tokenizer.id_to_piece(i): i for i in indices}


class ChatTemplate:
    """A chat template and the tokenizer whose ids it leads to.

    The ids are those of transformers' `apply_chat_template` with the exported tokenizer, with one difference that is
    meant: what looks like a special token inside a message stays text. Nobody ends a turn by writing `</s>`.

    Args:
        source: Jinja.
        tokenizer: of the model.

    Raises:
        DataError: if the Jinja cannot be parsed.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        self._special = special_pieces(tokenizer)
        self._split = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))))
        # Behind the first character of what looks like a special piece, also where two of them overlap.
        self._inside = re.compile(f"(?=(?:{self._split.pattern}))(.)", re.DOTALL)
        texts = {name: self._piece(i) for name, i in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))}
        try:
            self._template = _environment().from_string(source, globals=texts)
        except TemplateError as error:
            raise DataError(f"the chat template is not valid Jinja: {error}") from None
        self.end_of_turn: int | None = None
        """Id of the special token behind every answer; None where the template can be talked to, but not trained on."""
        with contextlib.suppress(DataError):
            ids, counts = self.training_ids((Message("user", "A"), Message("assistant", "B")))
            self.end_of_turn = [i for i, inside in zip(ids, counts, strict=True) if inside][-1]

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the end of a turn, and the end of a text where that is another."""
        return list(dict.fromkeys(i for i in (self.end_of_turn, self.tokenizer.eos_id) if i is not None and i >= 0))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, as transformers renders it.

        Raises:
            DataError: if the template refuses the conversation.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=add_generation_prompt)
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses a conversation: {error}") from None

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the next answer begins."""
        guard, guarded = self._guarded(messages)
        return self._encode(self.render(guarded, add_generation_prompt=True), [], guard)[0]

    def training_ids(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and for each whether it belongs to an answer or ends one.

        Raises:
            DataError: if the template refuses the conversation, ends an answer without a special token, or changes
                what stands before it.
        """
        guard, guarded = self._guarded(messages)
        return self._encode(*self._answers(guarded), guard)

    def _piece(self, index: int) -> str:
        return self.tokenizer.id_to_piece(index) if index >= 0 else ""

    def _guarded(self, messages: Sequence[Message]) -> tuple[str, list[Message]]:
        """The messages with a character inside all that looks like a special piece, and that character.

        It is one of Unicode's noncharacters that no message holds, and is taken out again before encoding.
        """
        text = "".join(message.content for message in messages)
        guard = next((chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in text), None)
        if guard is None:
            raise DataError("a conversation holds all of the noncharacters U+FDD0 to U+FDEF; it is no text")
        if self._split.search(text) is None:
            return guard, list(messages)
        return guard, [
            Message(message.role, self._inside.sub(rf"\g<1>{guard}", message.content)) for message in messages
        ]

    def _answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and where in it each answer begins and, with its special token, ends."""
        rendered, spans = self.render(messages), []
        for place, message in enumerate(messages):
            if message.role == "assistant":
                before = self.render(messages[:place], add_generation_prompt=True)
                behind = self.render(messages[: place + 1])
                if not (rendered.startswith(behind) and behind.startswith(before)):
                    raise DataError(
                        "the chat template changes what stands before an answer once the answer is there, "
                        "so it cannot be told which tokens to train on; use one that only adds"
                    )
                start = self._last_special(behind, len(before), len(behind))
                if start < 0:
                    raise DataError("the chat template ends answers without a special token: add {{ eos_token }}")
                matched = self._split.match(behind, start)
                assert matched is not None
                spans.append((len(before), matched.end()))
        return rendered, spans

    def _last_special(self, text: str, start: int, end: int) -> int:
        return max((match.start() for match in self._split.finditer(text, start, end)), default=-1)

    def _encode(self, text: str, answers: Sequence[tuple[int, int]], guard: str) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        counts: list[bool] = []

        def add(start: int, end: int) -> None:
            """Encode a stretch without special tokens; an answer reaches from somewhere in it to its end, if at all."""
            if start == end:
                return
            begin = next((a for a, b in answers if a < end <= b), end)
            new = self.tokenizer.encode(text[start:end].replace(guard, ""))
            prompt = self._tokens_before(text[start : max(begin, start)].replace(guard, ""), new)
            ids.extend(new)
            counts.extend([False] * prompt + [True] * (len(new) - prompt))

        position = 0
        for match in self._split.finditer(text):
            add(position, match.start())
            ids.append(self._special[match[0]])
            counts.append(any(a <= match.start() and match.end() <= b for a, b in answers))
            position = match.end()
        add(position, len(text))
        return ids, counts

    def _tokens_before(self, prompt: str, ids: Sequence[int]) -> int:
        """How many of the ids hold a character of the prompt that their text begins with."""
        if not prompt:
            return 0
        alone = self.tokenizer.encode(prompt)
        if list(ids[: len(alone)]) == alone:
            return len(alone)
        # A piece reaches over the boundary; it counts as the prompt's. Grown until it spells all of the prompt.
        target = len(self.tokenizer.decode(alone).encode())
        return next(n for n in range(1, len(ids) + 1) if len(self.tokenizer.decode(ids[:n]).encode()) >= target)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


class _GenerationTag(Extension):
    """`{% generation %}` of transformers, which marks answers; where they are is found without it."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up: whitespace of blocks, loop controls, and the functions templates may call."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

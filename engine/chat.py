"""A checkpoint to talk to: its model, tokenizer and chat template, and answers as they are generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch

from ..model import Llama, generate, load_model, read_config
from ..tokenizer import Tokenizer
from .chat_templates import ChatTemplate, stored_template, template_source
from .conversations import Message
from .errors import RecipeError
from .text_generation import TextStream, check_vocabulary, stop_ids


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is drawn; see `redwhale.model.generate` for each."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class Answer:
    """Text that is generated while it is iterated over, and what is known of it behind the last piece."""

    def __init__(
        self, model: Llama, stream: TextStream, ids: Sequence[int], stops: set[int], sampling: Sampling
    ) -> None:
        self._stream, self._limit = stream, sampling.max_new_tokens
        self.prompt_tokens = len(ids)
        self.completion_tokens = 0
        self._room = model.config.context_length - len(ids) + 1  # the last token is yielded, but never read
        self._tokens = generate(
            model,
            ids,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            stop_ids=stops,
            seed=sampling.seed,
        )

    @property
    def finish_reason(self) -> str:
        """Either "stop" (the model or a stop string ended it) or "length" (the limit or the context did)."""
        ended = not self._stream.stopped and self.completion_tokens >= min(self._limit, self._room)
        return "length" if ended else "stop"

    def __iter__(self) -> Iterator[str]:
        return self._stream.pieces(self._counted())

    def _counted(self) -> Iterator[int]:
        for token in self._tokens:
            self.completion_tokens += 1
            yield token


class ChatModel:
    """A checkpoint ready to answer.

    Args:
        model: any model of this package.
        tokenizer: the one it was trained with.
        template: of its conversations.
        name: what it is called.

    Raises:
        GenerationError: if the tokenizer has more pieces than the model rows.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, template: ChatTemplate, name: str = "redwhale") -> None:
        check_vocabulary(tokenizer, model.config.vocab_size)
        self.model, self.tokenizer, self.template, self.name = model, tokenizer, template, name
        self._stop_ids = {*stop_ids(tokenizer, model.config.vocab_size), *template.stop_ids}

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        *,
        template: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> ChatModel:
        """Read a Hugging Face folder.

        Args:
            checkpoint: with `tokenizer.model` beside the weights.
            template: a name or file as of `template_source`; None for the one that the folder carries.
            device, dtype: of the weights; None keeps the stored dtype.

        Raises:
            RecipeError: if the folder has no tokenizer, or no chat template and none is given.
            CheckpointError, DataError, TokenizerError: if a file in it cannot be used.
        """
        tokenizer, chat_template = read_chat_files(checkpoint, template)
        model = load_model(checkpoint, device=device, dtype=dtype)
        return cls(model, tokenizer, chat_template, Path(checkpoint).resolve().name)

    def answer(self, messages: Sequence[Message], sampling: Sampling) -> Answer:
        """The next answer of a conversation; errors as of `generate_text`."""
        return self.continue_ids(self.template.prompt_ids(messages), sampling, behind=False)

    def continue_ids(self, ids: Sequence[int], sampling: Sampling, *, behind: bool = True) -> Answer:
        """Text behind some token ids; `behind` says whether it keeps a space at its start."""
        stream = TextStream(self.tokenizer, sampling.stop, behind=ids if behind else ())
        return Answer(self.model, stream, ids, self._stop_ids, sampling)

    def fitting(self, messages: Sequence[Message], room: int) -> list[Message]:
        """The conversation without its oldest turns, as few as leave `room` tokens for an answer.

        The system message stays, and so does the last question, however long it is.
        """
        system = [message for message in messages[:1] if message.role == "system"]
        turns = list(messages[len(system) :])
        context = self.model.config.context_length
        while len(turns) > 1 and len(self.template.prompt_ids([*system, *turns])) + room > context:
            turns = turns[2:]
        return [*system, *turns]


def read_chat_files(checkpoint: Path, template: str | None = None) -> tuple[Tokenizer, ChatTemplate]:
    """Tokenizer and chat template of a checkpoint, without its weights; arguments and errors as of `ChatModel.load`."""
    config = read_config(checkpoint)
    path = Path(checkpoint) / "tokenizer.model"
    if not path.exists():
        raise RecipeError(f"{checkpoint} has no tokenizer.model: put the one of its model beside the weights")
    tokenizer = Tokenizer(path)
    check_vocabulary(tokenizer, config.vocab_size)
    source = stored_template(Path(checkpoint)) if template is None else template_source(template, tokenizer)
    if source is None:
        raise RecipeError(
            f"{checkpoint} carries no chat template, so it was not fine-tuned to chat: "
            "give one with --template (redwhale, chatml, llama-2 or a file), or use `redwhale generate` without --chat"
        )
    return tokenizer, ChatTemplate(source, tokenizer)

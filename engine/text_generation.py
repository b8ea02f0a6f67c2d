"""From prompt to text: generation that streams whole characters and ends before a stop string."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from ..model import Llama, generate, generate_batch
from ..model.errors import GenerationError
from ..tokenizer import StreamDecoder, Tokenizer


class StopFilter:
    """Let text through up to a stop string, holding back only what could be the beginning of one.

    Of several stop strings the one that is complete first counts, and of those complete at once the longest. What
    comes out is the same however the text is cut into pieces.

    Args:
        stops: strings that end the text; they do not come out.

    Raises:
        GenerationError: if one is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        check_stops(stops)
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come."""

    def feed(self, text: str) -> str:
        """Return what is certain to come before any stop string; after one, nothing."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        passed = []
        for character in text:
            # The longest possible beginning is held, so a stop string that ends here lies wholly in it.
            self._held += character
            if stop := next((stop for stop in self._stops if self._held.endswith(stop)), None):
                passed.append(self._held.removesuffix(stop))
                self._held, self.stopped = "", True
                break
            kept = self._possible_beginning()
            passed.append(self._held[: len(self._held) - kept])
            self._held = self._held[len(self._held) - kept :]
        return "".join(passed)

    def flush(self) -> str:
        """Return what was held back, once the text is at its end."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        for start in range(len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return len(self._held) - start
        return 0


class TextStream:
    """Turn ids into text in pieces that are whole characters, up to the first stop string.

    Args:
        tokenizer: of the ids.
        stops: see `StopFilter`.
        behind: ids that the text continues; only with them does it keep a space at its start.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), behind: Sequence[int] = ()) -> None:
        self._filter = StopFilter(stops)
        self._decoder = StreamDecoder(tokenizer)
        for index in behind:
            self._decoder.feed(index)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def feed(self, index: int) -> str:
        """Return the text that becomes certain with this id, which may be empty."""
        return self._filter.feed(self._decoder.feed(index))

    def flush(self) -> str:
        """Return what was held back, once the last id has come."""
        return self._filter.feed(self._decoder.flush()) + self._filter.flush()

    def pieces(self, indices: Iterable[int]) -> Iterator[str]:
        """Yield the text of all ids piece by piece; none is taken behind a stop string."""
        for index in indices:
            if text := self.feed(index):
                yield text
            if self.stopped:
                return
        if text := self.flush():
            yield text


def generate_text(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    stop: Sequence[str] = (),
    ends: Collection[int] = (),
    answer: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the text behind a prompt in pieces, as soon as each is certain.

    It ends at the end-of-text token, before a stop string, at `max_new_tokens`, or where the context is full.

    Args:
        model: any model of this package.
        tokenizer: the one the model was trained with.
        prompt: NFC-normalised, with the beginning-of-text token put before it where the tokenizer has one; or token
            ids, such as those of a chat template, taken as they are.
        stop: see `StopFilter`; only the new text is searched.
        ends: ids of more tokens that end the text, as the end-of-text token does.
        answer: the new text stands for itself, as behind a chat template, and does not start with the space
            between two words; otherwise prompt and pieces concatenate to one text.
        max_new_tokens, temperature, top_p, repetition_penalty, seed: see `generate`.

    Raises:
        GenerationError: if a setting is out of range, a stop string empty, the prompt longer than the context, or
            the tokenizer another model's.
        TokenizerError: if the prompt is no Unicode text.
    """
    check_vocabulary(tokenizer, model.config.vocab_size)
    ids = prompt_ids(tokenizer, prompt)
    stream = TextStream(tokenizer, stop, behind=() if answer else ids)
    tokens = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop_ids={*stop_ids(tokenizer, model.config.vocab_size), *ends},
        seed=seed,
    )
    return stream.pieces(tokens)


def generate_texts(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    ends: Collection[int] = (),
    answer: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The text behind each prompt, all generated at the same time; arguments and errors as in `generate_text`."""
    check_vocabulary(tokenizer, model.config.vocab_size)
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    streams = [TextStream(tokenizer, stop, behind=() if answer else prompt) for prompt in ids]
    texts = [""] * len(prompts)

    def add(index: int, token: int) -> bool:
        texts[index] += streams[index].feed(token)
        return streams[index].stopped

    generate_batch(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop_ids={*stop_ids(tokenizer, model.config.vocab_size), *ends},
        seed=seed,
        on_token=add,
    )
    return [text + stream.flush() for text, stream in zip(texts, streams, strict=True)]


def check_stops(stops: Sequence[str]) -> None:
    """Raise GenerationError if a stop string is empty."""
    if "" in stops:
        raise GenerationError("a stop string is empty; leave it out to end at the end-of-text token alone")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise GenerationError if the tokenizer has pieces that the model has no rows for.

    More rows than pieces are common: vocabularies are padded, and tokens added that the `.model` does not hold.
    """
    if tokenizer.vocab_size > vocab_size:
        raise GenerationError(
            f"the checkpoint has {vocab_size} tokens, {str(tokenizer.path)!r} has {tokenizer.vocab_size}; "
            "use the tokenizer that belongs to the checkpoint"
        )


def stop_ids(tokenizer: Tokenizer, vocab_size: int) -> set[int]:
    """Tokens that end a text: end-of-text, and those beyond the tokenizer, which stand for no text."""
    return {tokenizer.eos_id, *range(tokenizer.vocab_size, vocab_size)}


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Ids of a prompt, behind the beginning-of-text token where the tokenizer has one; what are ids stays so."""
    if not isinstance(prompt, str):
        return list(prompt)
    return [tokenizer.bos_id] * (tokenizer.bos_id >= 0) + tokenizer.encode(prompt)

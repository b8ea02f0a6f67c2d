"""Loss of a model on packed text: nats per token, next-token accuracy, and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec
import torch
from torch import nn

from ..model import Llama
from ..tokenizer import Tokenizer
from .batches import IGNORE_INDEX, Batch, ExampleSequences, SequenceSource
from .losses import LossFunction, loss_sums, next_token_loss
from .world import ALONE, World


class LossResult(msgspec.Struct, frozen=True, kw_only=True):
    """Loss of a model on some text."""

    loss: float
    """Mean cross-entropy in nats per predicted token; not comparable across tokenizers."""
    accuracy: float | None
    """Share of tokens whose most likely prediction is right; None for a loss function that does not tell."""
    bits_per_byte: float | None
    """Total cross-entropy in bits over the UTF-8 bytes of the text, comparable across tokenizers."""
    tokens: int
    """Predicted tokens."""


class ValidationSet(NamedTuple):
    """Held-out sequences."""

    source: SequenceSource
    text_bytes: int | None = None
    """UTF-8 bytes of the text behind them, for bits per byte."""


class TextEncoder(Protocol):
    """What measuring a model on text needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Tokens, all of which need a row."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Put before a document, where there is one."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Put behind a document, where there is one."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, without BOS and EOS."""
        ...


def evaluate_loss(
    model: nn.Module,
    source: SequenceSource,
    *,
    batch_size: int,
    text_bytes: int | None = None,
    loss: LossFunction = next_token_loss,
    world: World = ALONE,
) -> LossResult:
    """Loss on every sequence of `source`.

    Args:
        model: any model; its device decides where this runs.
        source: numbered sequences.
        batch_size: sequences in a forward pass.
        text_bytes: UTF-8 bytes of the text behind the sequences, for bits per byte.
        loss: of the model on a batch.
        world: processes that share the model, and the sequences.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    # Tensors of inference mode would stay with the model that processes share, and could not be trained with.
    with torch.inference_mode() if world.size == 1 else torch.no_grad():
        for first in range(0, len(source), batch_size * world.size):
            begin = first + batch_size * world.rank
            # Each forward pass takes all processes: one with nothing left computes something that does not count.
            counts = begin < len(source)
            begin = begin if counts else first
            batch = Batch.collate(
                [source.sequence(index) for index in range(begin, min(begin + batch_size, len(source)))], device
            )
            found = loss_sums(loss(model, batch))
            if counts:
                sums[:2] += torch.stack([found.nats.double(), found.correct.double()])
                sums[2] += batch.num_targets
        nats, correct, targets = world.sum_(sums).tolist()
    tokens = int(targets)
    return LossResult(
        loss=nats / max(1, tokens),
        accuracy=None if math.isnan(correct) else correct / max(1, tokens),
        bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else None,
        tokens=tokens,
    )


def text_windows(tokenizer: TextEncoder, texts: Sequence[str], window: int) -> ExampleSequences:
    """Documents as the packer writes them (BOS, text, EOS, where there are such), cut into windows of `window` tokens.

    A window's first target is the token behind the window before it, so that every token but BOS is
    predicted exactly once.
    """
    examples = []
    for ids in tokenizer.encode_batch(texts):
        document = [i for i in (tokenizer.bos_id, *ids, tokenizer.eos_id) if i is not None]
        targets = [*document[1:], IGNORE_INDEX]
        for begin in range(0, len(document), window):
            examples.append((document[begin : begin + window], targets[begin : begin + window]))
    return ExampleSequences(examples, window, seed=0)


def evaluate_text(
    model: Llama, tokenizer: Tokenizer, texts: Sequence[str], *, window: int = 512, batch_size: int = 8
) -> LossResult:
    """Loss and bits per byte on plain texts, end-of-sequence tokens included.

    Args:
        model: whose vocabulary is the tokenizer's.
        tokenizer: encodes the texts.
        texts: documents.
        window: most tokens of context; the model's own limit where that is lower.
        batch_size: windows in a forward pass.
    """
    window = min(window, model.config.context_length)
    text_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return evaluate_loss(model, text_windows(tokenizer, texts, window), batch_size=batch_size, text_bytes=text_bytes)

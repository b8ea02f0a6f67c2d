"""What the trainer and the evaluation ask of a model: a loss over a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import LinearCrossEntropyOutput
from .batches import Batch

LossFunction = Callable[[nn.Module, Batch], "LinearCrossEntropyOutput | Tensor"]
"""Takes the model and a batch; gives what `linear_cross_entropy` gives, or a scalar: the loss, summed over the batch's
`num_targets` target tokens. Every token of a global batch then weighs the same, however it is divided."""


class LossSums(NamedTuple):
    """Sums over the target tokens of a batch, scalars on the device."""

    objective: Tensor
    """What is minimised; carries the gradient."""
    nats: Tensor
    """Cross-entropy alone, without z-loss or label smoothing."""
    lse: Tensor
    """ln Σ exp(logits); NaN where the loss function does not tell."""
    correct: Tensor
    """Targets with the highest logit; NaN where the loss function does not tell."""


def next_token_loss(model: nn.Module, batch: Batch, *, z_loss: float = 0.0) -> LinearCrossEntropyOutput:
    """The loss of a `Llama`, or of anything else with its `loss` method."""
    return model.loss(batch.input_ids, batch.targets, batch.documents, z_loss=z_loss)  # type: ignore[operator]


def loss_sums(output: LinearCrossEntropyOutput | Tensor) -> LossSums:
    """The sums in what a loss function returned."""
    if isinstance(output, Tensor):
        unknown = torch.full((), torch.nan, device=output.device)
        return LossSums(output, output.detach(), unknown, unknown)
    return LossSums(output.loss_sum, output.token_losses.sum(), output.lse.sum(), output.correct)

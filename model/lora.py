"""Low-rank adaptation of linear layers (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import CheckpointError

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a decoder layer."""


class LoRALinear(nn.Linear):
    """y = x·Wᵀ + (alpha/r)·(x·Aᵀ)·Bᵀ with W as in the layer it replaces, A [r, in] and B [out, r].

    B starts at zero, so the layer starts as the one it replaces. W keeps its name, `weight`.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, generator: torch.Generator | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.scale = alpha / r
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        bound = 1.0 / math.sqrt(base.in_features)  # Kaiming uniform with a = √5, as in the paper's code
        values = torch.empty(r, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(values.to(**like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + ((input @ self.lora_A.T) @ self.lora_B.T) * self.scale

    def merged_weight(self) -> Tensor:
        """W + (alpha/r)·B·A, computed in fp32 and rounded once to the dtype of W."""
        delta = self.lora_B.detach().float() @ self.lora_A.detach().float()
        return (self.weight.detach().float() + self.scale * delta).to(self.weight.dtype)


def add_lora(
    model: nn.Module, *, r: int, alpha: float, targets: Sequence[str] = LINEAR_LAYERS, seed: int = 0
) -> list[str]:
    """Replace every linear layer of the decoder whose last name is in `targets` by a `LoRALinear`.

    Args:
        model: the module to change in place.
        r: rank.
        alpha: the update is scaled by alpha / r.
        targets: names such as "q_proj".
        seed: of the A matrices, drawn on the CPU in the model's own order.

    Returns:
        The names of the new parameters.

    Raises:
        CheckpointError: if a target names no layer of the decoder, or one that has an adapter already.
    """
    if r < 1:
        raise CheckpointError(f"LoRA rank {r} is not positive")
    generator = torch.Generator().manual_seed(seed)
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        # Only the decoder's projections: the fused loss reads the LM head's weight and would pass an adapter by.
        if name in targets and name in LINEAR_LAYERS and isinstance(child, nn.Linear)
    ]
    if missing := sorted(set(targets) - {name for _, name, _ in layers}):
        raise CheckpointError(f"LoRA target {missing[0]!r} names no linear layer; known: {', '.join(LINEAR_LAYERS)}")
    if adapted := [name for _, name, child in layers if isinstance(child, LoRALinear)]:
        raise CheckpointError(f"{adapted[0]} has a LoRA adapter already: merge_lora it before adding another")
    for parent, name, child in layers:
        setattr(parent, name, LoRALinear(child, r, alpha, generator))
    return [name for name, _ in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))]


def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into its weight and put plain linear layers back, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                merged = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                merged.weight = nn.Parameter(child.merged_weight(), requires_grad=child.weight.requires_grad)
                merged.register_parameter("bias", child.bias)
                setattr(parent, name, merged)

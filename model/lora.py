"""Low-rank adaptation of linear layers (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from ..kernels.lora_linear import LoRALinear
from .errors import CheckpointError

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a Llama decoder layer."""
ADAPTABLE_LAYERS = (*LINEAR_LAYERS, "dense", "fc1", "fc2")
"""Those, and what Phi-2's layers call theirs."""


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can have an adapter, by whole name, in model order: every linear one but the LM head."""
    # The fused loss reads the LM head's weight and would pass an adapter by.
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _last(name) != "lm_head"
    }


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Whether `targets` means the layer of this whole name, in the sense of PEFT's `target_modules`.

    Raises:
        CheckpointError: if `targets` is a string that is no regular expression.
    """
    if not isinstance(targets, str):
        return any(name == target or name.endswith(f".{target}") for target in targets)
    if targets.lower() == "all-linear":
        return True
    try:
        return re.fullmatch(targets, name) is not None
    except re.error as error:
        raise CheckpointError(f"LoRA target {targets!r} is not a regular expression: {error}") from None


def add_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    targets: str | Sequence[str] = LINEAR_LAYERS,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Replace the linear layers that `targets` means by `LoRALinear`s; the LM head cannot be one of them.

    Args:
        model: the module to change in place.
        r: rank.
        alpha: the update is scaled by alpha / r.
        targets: a list of last names ("q_proj") or whole names ("model.layers.0.mlp.up_proj"), or one string:
            "all-linear" for every linear layer, or else a regular expression that matches whole names.
        dropout: probability with which an entry of the adapter's input is zero in training, the rest being
            scaled by 1 / (1 − dropout).
        rslora: scale by alpha / √r instead.
        seed: of the A matrices, drawn on the CPU in the model's own order.

    Returns:
        The names of the new parameters.

    Raises:
        CheckpointError: if a target names no layer, or one that has an adapter already, or a value is out of range.
    """
    if r < 1:
        raise CheckpointError(f"LoRA rank {r} is not positive")
    if not 0 <= dropout < 1:
        raise CheckpointError(f"LoRA dropout {dropout} is not in [0, 1)")
    generator = torch.Generator().manual_seed(seed)
    layers = linear_layers(model)
    for target in [targets] if isinstance(targets, str) else [(target,) for target in targets]:
        if not any(is_target(name, target) for name in layers):
            known = ", ".join(dict.fromkeys(_last(name) for name in layers))
            if isinstance(target, str):
                known += f"; a pattern matches whole names, such as {next(iter(layers), 'model.layers.0.mlp.up_proj')}"
            shown = target if isinstance(target, str) else target[0]
            raise CheckpointError(f"LoRA target {shown!r} names no linear layer; known: {known}")
    chosen = {name: layer for name, layer in layers.items() if is_target(name, targets)}
    if adapted := [name for name, layer in chosen.items() if isinstance(layer, LoRALinear)]:
        raise CheckpointError(f"{adapted[0]} has a LoRA adapter already: merge_lora it before adding another")
    for name, layer in chosen.items():
        replace_module(model, name, LoRALinear(layer, r, alpha, generator, dropout=dropout, rslora=rslora))
    return [f"{name}.{matrix}" for name in chosen for matrix in ("lora_A", "lora_B")]


def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into its weight and put plain linear layers back, in place."""
    for name, layer in adapted_layers(model).items():
        merged = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(layer.merged_weight(), requires_grad=layer.weight.requires_grad)
        merged.register_parameter("bias", layer.bias)
        replace_module(model, name, merged.train(layer.training))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by whole name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule of this whole name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)

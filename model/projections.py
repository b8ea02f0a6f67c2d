"""A decoder layer's linear layers, with their adapters if they have any, as the two operations of the kernels.

Both take the residual stream and normalise it themselves, so that backward keeps the stream alone, which other
operations keep anyway, and computes the normalised input, and the product of SwiGLU, again. Without `recompute`, the
same steps are operations of their own, each of which keeps what its backward reads; dropout draws the same masks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..kernels import LoRALinear, LoRAWeights, RMSNorm, dropout_seed, lora_linear, lora_linears, lora_mlp, swiglu
from .fp8_base import Fp8Linear


def _weights(layer: nn.Linear) -> LoRAWeights:
    special = isinstance(layer, LoRALinear | Fp8Linear)
    return layer.adapter_weights() if special else LoRAWeights(layer.weight, layer.bias)


def _shared_dropout(layers: Sequence[nn.Linear]) -> float | None:
    """Dropout of all adapters in these layers, 0 outside training; None if they differ."""
    found = {layer.dropout for layer in layers if isinstance(layer, LoRALinear) and layer.training}
    return None if len(found) > 1 else next(iter(found), 0.0)


def _known(layers: Sequence[nn.Linear]) -> bool:
    """Whether the layers do what their class here does, and nothing that a user put in their place or around them."""
    return all(
        type(layer) in (nn.Linear, LoRALinear, Fp8Linear) and not layer._forward_hooks and not layer._forward_pre_hooks
        for layer in layers
    )


def project(x: Tensor, norm: RMSNorm, layers: Sequence[nn.Linear], *, recompute: bool = True) -> tuple[Tensor, ...]:
    """`layer(norm(x))` of each layer.

    Args:
        x: [N, H]: the residual stream.
        norm: in front of all of them.
        layers: linear layers of H inputs.
        recompute: whether backward computes norm(x) again, or it is kept.

    Returns:
        [N, O_i] each.
    """
    dropout = _shared_dropout(layers)
    if dropout is None or not _known(layers):
        normalised = norm(x)
        return tuple(layer(normalised) for layer in layers)
    seed = dropout_seed(x.device) if dropout else None
    weights = [_weights(layer) for layer in layers]
    if not recompute:
        return lora_linears(norm(x), weights, dropout=dropout, seed=seed)
    return lora_linears(x, weights, norm_weight=norm.weight, norm_eps=norm.eps, dropout=dropout, seed=seed)


def gated_mlp(
    x: Tensor, norm: RMSNorm, gate: nn.Linear, up: nn.Linear, down: nn.Linear, *, recompute: bool = True
) -> Tensor:
    """down(silu(gate(norm(x))) · up(norm(x))), [N, H] like the residual stream `x`.

    `recompute`: whether backward computes norm(x) and the product that `down` reads again, or they are kept.
    """
    layers = (gate, up, down)
    dropout = _shared_dropout(layers)
    if dropout is None or not _known(layers):
        normalised = norm(x)
        return down(swiglu(gate(normalised), up(normalised)))
    seed = dropout_seed(x.device, 2) if dropout else None
    weights = [_weights(layer) for layer in layers]
    if not recompute:
        seed_x, seed_act = (None, None) if seed is None else (seed[:1], seed[1:])
        wide = lora_linears(norm(x), weights[:2], dropout=dropout, seed=seed_x)
        return lora_linear(swiglu(*wide), weights[2], dropout=dropout, seed=seed_act)
    return lora_mlp(x, *weights, norm_weight=norm.weight, norm_eps=norm.eps, dropout=dropout, seed=seed)

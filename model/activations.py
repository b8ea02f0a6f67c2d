"""What a forward pass through the decoder layers keeps for backward.

The four policies compute the same function. `full` and `offload` give the bits of `recompute-cheap`. So does `none`
with the PyTorch backend, but for adapters with dropout in bf16 or fp16: the two parts of the gradient of what the down
projection reads are added in the other order. With the Triton backend it takes other kernels, which round elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.launch import on_gpu
from .activation_offload import HostOffload
from .attention import PackedDocuments

Activations = Literal["none", "recompute-cheap", "full", "offload"]
"""How much of the forward pass is computed again in backward:

- none: nothing; normalised inputs and the product of SwiGLU are kept as well.
- recompute-cheap: norms and SwiGLU, which cost a pass over memory and no matrix product.
- full: every layer, of which the input alone is kept; about a third more FLOPs where everything trains.
- offload: as in recompute-cheap, and what that keeps waits in host memory, unless the model is on a CPU.
"""


def run_layers(
    layers: Iterable[nn.Module], policy: Activations, x: Tensor, cos: Tensor, sin: Tensor, documents: PackedDocuments
) -> Tensor:
    """Output of the last of `layers`.

    Args:
        layers: decoder layers.
        policy: what they keep for backward.
        x: [N, H]: input of the first.
        cos, sin: [N, D/2]: angles of RoPE.
        documents: layout of the N tokens.

    Returns:
        [N, H].
    """
    offload = HostOffload(x.device, shared=(cos, sin)) if policy == "offload" and on_gpu(x) else None
    for layer in layers:
        if policy == "full":
            x = checkpoint(layer, x, cos, sin, documents, None, use_reentrant=False)  # type: ignore[assignment]
        elif offload is not None:
            with offload.layer(layer):
                x = layer(x, cos, sin, documents, None)
        else:
            x = layer(x, cos, sin, documents, None, policy != "none")
    return x


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile every decoder layer by itself, in place: layers that train alike share their graphs.

    Attention over documents stays outside of them, so that other document lengths compile nothing anew; another number
    of tokens does, and so does evaluation. Names and weights stay as they are, and what is kept for backward is the
    policy's. All that was compiled before in this process is forgotten, so that each stage of a training run has the
    whole of torch's limit of graphs for itself.

    Args:
        model: with decoder layers at `model.model.layers`, its adapters in place and what trains chosen.
        backend: of `torch.compile`.
    """
    torch.compiler.reset()
    for layer in model.get_submodule("model.layers").children():
        layer.compile(backend=backend, dynamic=False)

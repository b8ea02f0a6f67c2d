"""The frozen linear layers of a model in FP8 for the length of a training stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..kernels import LoRALinear, LoRAWeights, lora_linear, quantise_rows
from .errors import CheckpointError
from .lora import linear_layers, replace_module

_LEAST_CAPABILITY = (8, 9)
"""Of NVIDIA's GPUs that multiply FP8: Ada, Hopper, Blackwell."""
_MULTIPLE = 16
"""Of the sizes that their library multiplies."""


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a GPU has tensor cores for FP8 that torch uses."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


class Fp8Linear(nn.Linear):
    """A linear layer whose weight is in e4m3 with a scale for each output; it does not train.

    Args:
        base: the layer it stands for.
        weight: [O, I] float8_e4m3fn.
        scales: [O, 1] fp32.
        fp8_bias: [O], in place of the layer's bias; None for that itself.
    """

    def __init__(self, base: nn.Linear, weight: Tensor, scales: Tensor, fp8_bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.train(base.training)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", base.bias)
        self.register_buffer("weight_scales", scales, persistent=False)
        self.fp8_bias: Tensor | None
        self.register_buffer("fp8_bias", fp8_bias, persistent=False)

    def adapter_weights(self) -> LoRAWeights:
        """The layer's own tensors, for operations that take several layers at once."""
        bias = self.bias if self.fp8_bias is None else self.fp8_bias
        return LoRAWeights(self.weight, bias, weight_scales=self.get_buffer("weight_scales"))

    def forward(self, input: Tensor) -> Tensor:
        return lora_linear(input, self.adapter_weights())


class _Original(NamedTuple):
    """What a layer was before."""

    module: nn.Linear
    """The layer itself; with an adapter it stayed in its place."""
    weight: nn.Parameter | None
    """Its weight, where that had no other place to go."""
    on_host: Tensor | None
    """The weight's copy in the host's memory."""
    like: Tensor
    """Without memory: device and dtype of the weight."""


class Fp8Base:
    """Puts the linear layers that do not train into FP8, and back to every bit of what they were.

    The originals of a GPU's model wait in the host's memory: on the GPU they would take twice what FP8 saves. On a CPU
    they stay where they are. The embedding and the LM head are never among the layers.

    Codes follow from the weights alone. A weight's rounding is the same for every token, and where a few inputs are
    always large, it is a bias of the output: with the inputs' means μ, (W − Ŵ)·μ is added to it, as in Nagel et al.
    2019 (arXiv 1906.04721, section 4.2).

    Args:
        model: changed in place, one layer after the other: at no time does it take more than before and one layer.
        trained: names of the parameters that train at any time of the stage.
        means: of the inputs of the layers, from `input_means`; a layer without keeps its bias.

    Raises:
        CheckpointError: if the GPU or the weights' dtype or sizes do not allow it.
    """

    def __init__(self, model: nn.Module, trained: Collection[str], means: Mapping[str, Tensor] | None = None) -> None:
        self._model = model
        self._originals: dict[str, _Original] = {}
        self.host_bytes = 0
        """That the originals of a GPU's model take of the host's memory."""
        check_fp8(model, trained)
        for name, layer in _frozen_layers(model, trained).items():
            self._quantise(name, layer, None if means is None else means.get(name))

    @property
    def layers(self) -> list[str]:
        """Names of the layers in FP8."""
        return list(self._originals)

    @torch.no_grad()
    def _quantise(self, name: str, layer: nn.Linear, mean: Tensor | None) -> None:
        weight = cast(nn.Parameter, layer.weight)
        coded = codes, scales = quantise_rows([weight.detach()])
        bias = None
        if mean is not None:
            bias = (weight.float() - coded.dequantised()) @ mean
            bias = (bias if layer.bias is None else bias + layer.bias).to(weight.dtype)
        on_cpu = weight.device.type == "cpu"
        if not on_cpu:
            self.host_bytes += weight.nbytes
        # A plan's tensors have no content to keep.
        on_host = None if on_cpu or weight.is_meta else weight.detach().cpu()
        kept = weight if on_cpu else None
        self._originals[name] = _Original(layer, kept, on_host, weight.detach().new_empty(0))
        if isinstance(layer, LoRALinear):
            layer.weight, layer.weight_scales = nn.Parameter(codes, requires_grad=False), scales
            layer.fp8_bias = bias
        else:
            replace_module(self._model, name, Fp8Linear(layer, codes, scales, bias))
            if not on_cpu:
                layer.weight = nn.Parameter(weight.detach().new_empty(0), requires_grad=False)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the original weights back; nothing happens a second time."""
        for name in list(self._originals):
            layer, weight, on_host, like = self._originals.pop(name)
            if weight is None:
                shape = (layer.out_features, layer.in_features)
                values = like.new_empty(shape) if on_host is None else on_host.to(like.device)
                weight = nn.Parameter(values, requires_grad=False)
            layer.weight = weight
            if isinstance(layer, LoRALinear):
                layer.weight_scales = layer.fp8_bias = None
            else:
                layer.train(self._model.get_submodule(name).training)
                replace_module(self._model, name, layer)
        self.host_bytes = 0


@torch.no_grad()
def input_means(model: nn.Module, trained: Collection[str], run: Callable[[], object]) -> dict[str, Tensor]:
    """Mean input of each layer that `Fp8Base` would quantise, [I] fp32 by name.

    Args:
        model: put into evaluation mode meanwhile.
        trained: see `Fp8Base`.
        run: takes a batch through the model once.
    """
    means: dict[str, Tensor] = {}

    def measure(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        means[name] = given[0].detach().flatten(0, -2).mean(0, dtype=torch.float32)

    layers = _frozen_layers(model, trained)
    hooks = [layer.register_forward_pre_hook(functools.partial(measure, name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        run()
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return means


def _frozen_layers(model: nn.Module, trained: Collection[str]) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in linear_layers(model).items() if f"{name}.weight" not in trained}


def check_fp8(model: nn.Module, trained: Collection[str]) -> None:
    """Raise what `Fp8Base` would raise, and change nothing.

    Raises:
        CheckpointError: see `Fp8Base`.
    """
    for name, layer in _frozen_layers(model, trained).items():
        weight = layer.weight
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise CheckpointError(f"{name} is in {weight.dtype} already")
        if weight.is_cuda:
            gpu = torch.cuda.get_device_name(weight.device)
            problem = gpu_obstacle(gpu, multiplies_fp8(weight.device), weight.dtype, weight.shape)
            if problem is not None:
                raise CheckpointError(f'frozen = "fp8" {problem} ({name})')


def gpu_obstacle(gpu: str, multiplies: bool, dtype: torch.dtype, shape: torch.Size) -> str | None:
    """Why a GPU cannot multiply by a weight in FP8, as the end of a sentence; None if it can.

    Args:
        gpu: its name.
        multiplies: see `multiplies_fp8`.
        dtype: of the weight as stored.
        shape: of the weight.
    """
    if not multiplies:
        return f"needs FP8 tensor cores (NVIDIA Ada, Hopper or later), and {gpu} has none: leave it out"
    if dtype != torch.bfloat16:
        return 'multiplies bf16 activations on a GPU: set precision = "bf16"'
    if any(size % _MULTIPLE for size in shape):
        return f"needs sizes that are multiples of {_MULTIPLE}, and a weight is {list(shape)}: leave it out"
    return None

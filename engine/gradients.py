"""Gradients of a step: taken as backward passes complete them, added up over micro-batches in fp32."""

from __future__ import annotations

from collections.abc import KeysView, Mapping

import torch
from torch import Tensor, nn


class Gradients:
    """Where the gradients of a step's parameters are, until an update drops them.

    A single micro-batch leaves them in `.grad`. Of several, those of bf16 parameters go to fp32 accumulators at once,
    so that bf16 gradients of all parameters never exist together; fp32 parameters add them up in `.grad` themselves.
    Kernels that add to an fp32 buffer of their own leave `.grad` empty.
    """

    def __init__(self) -> None:
        self._parameters: Mapping[str, nn.Parameter] = {}
        self._micro_batches = 1
        self._passes: dict[str, int] = {}
        self._accumulators: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    def start(self, parameters: Mapping[str, nn.Parameter], micro_batches: int) -> None:
        """Begin a step on these parameters; drop what is left of another, and the memory of other parameters."""
        for name in self._parameters.keys() - parameters.keys():
            self._parameters[name].grad = None
        for kept in (self._accumulators, self._buffers):
            for name in kept.keys() - parameters.keys():
                del kept[name]
        self._parameters, self._micro_batches = parameters, micro_batches
        self._passes, self._norms = dict.fromkeys(parameters, 0), {}
        for parameter in parameters.values():
            parameter.grad = None
        for buffer in self._buffers.values():
            buffer.zero_()

    def buffer(self, name: str) -> Tensor:
        """fp32 buffer in the parameter's shape, zero when a step begins, that holds the gradient from now on."""
        if name not in self._buffers:
            parameter = self._parameters[name]
            self._buffers[name] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        return self._buffers[name]

    def take(self, name: str) -> bool:
        """Take a parameter's `.grad`, which a backward pass has completed, unless it has a buffer.

        Returns:
            Whether it was the last of the step's micro-batches and the gradient is complete.

        Raises:
            RuntimeError: after more backward passes than micro-batches.
        """
        parameter = self._parameters[name]
        gradient = parameter.grad
        assert gradient is not None
        self._passes[name] += 1
        if self._passes[name] > self._micro_batches:
            raise RuntimeError(f"{name} got a gradient in more backward passes than start_step named micro-batches")
        if self._micro_batches > 1 and parameter.dtype != torch.float32:
            if self._passes[name] > 1:
                self._accumulators[name].add_(gradient)
            elif name in self._accumulators:
                self._accumulators[name].copy_(gradient)
            else:
                self._accumulators[name] = gradient.float()
            parameter.grad = None
        return self._passes[name] == self._micro_batches

    def add_to_buffer(self, name: str) -> None:
        """Take a parameter's `.grad`, which a backward pass has completed, into the parameter's buffer."""
        gradient = self._parameters[name].grad
        assert gradient is not None
        self._buffers[name].add_(gradient)
        self._parameters[name].grad = None

    def of(self, name: str) -> Tensor | None:
        """The sum of a parameter's gradients in this step, in the parameter's shape; None if there were none."""
        if name in self._buffers:
            return self._buffers[name]
        if self._micro_batches > 1 and name in self._accumulators:
            return self._accumulators[name] if self._passes[name] else None
        return self._parameters[name].grad

    def measure(self, name: str) -> Tensor:
        """L2 norm of a parameter's gradient, an fp32 scalar; it counts in `norm`."""
        gradient = self.of(name)
        assert gradient is not None
        self._norms[name] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        return self._norms[name]

    def measure_and_drop(self, name: str) -> None:
        """Count a gradient in `norm` as if it had never been there otherwise."""
        self.measure(name)
        if name in self._buffers:
            self._buffers[name].zero_()
        self._parameters[name].grad = None

    def norm(self) -> Tensor:
        """L2 norm of all gradients that were measured: the norm of their norms, in the order of the names."""
        norms = [self._norms[name] for name in sorted(self._norms)]
        if norms:
            return torch.linalg.vector_norm(torch.stack(norms))
        return torch.zeros((), device=next((p.device for p in self._parameters.values()), None))

    def drop(self, name: str, *, free: bool) -> None:
        """Forget a parameter's gradient after its update.

        Args:
            name: of the parameter.
            free: give its accumulator's memory back as well, instead of keeping it for the next step.
        """
        self._parameters[name].grad = None
        if free:
            self._accumulators.pop(name, None)

    @property
    def buffered(self) -> KeysView[str]:
        """Names of the parameters whose gradients kernels add to a buffer."""
        return self._buffers.keys()

    def tensors(self) -> list[Tensor]:
        """What is held now: `.grad`s, accumulators and buffers."""
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        return [*gradients, *self._accumulators.values(), *self._buffers.values()]

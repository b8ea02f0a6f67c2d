"""Gradients of a step: taken as backward passes complete them, added up over micro-batches in fp32."""

from __future__ import annotations

from collections.abc import KeysView, Mapping

import torch
from torch import Tensor, nn

from .parts import WHOLE, Parts


class Gradients:
    """Where the gradients of a step's parameters are, until an update drops them.

    A single micro-batch leaves them in `.grad`. Of several, those of bf16 parameters go to fp32 accumulators at once,
    so that bf16 gradients of all parameters never exist together; fp32 parameters add them up in `.grad` themselves.
    Kernels that add to an fp32 buffer of their own leave `.grad` empty.

    Args:
        parts: what this process holds of the parameters, and so of their gradients.
    """

    def __init__(self, parts: Parts = WHOLE) -> None:
        self._parts = parts
        self._parameters: Mapping[str, nn.Parameter] = {}
        self._micro_batches = 1
        self._passes: dict[str, int] = {}
        self._accumulators: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._summed: set[str] = set()

    def start(self, parameters: Mapping[str, nn.Parameter], micro_batches: int) -> None:
        """Begin a step on these parameters; drop what is left of another, and the memory of other parameters."""
        for name in self._parameters.keys() - parameters.keys():
            self._parameters[name].grad = None
        for kept in (self._accumulators, self._buffers):
            for name in kept.keys() - parameters.keys():
                del kept[name]
        self._parameters, self._micro_batches = parameters, micro_batches
        self._passes, self._norms, self._summed = dict.fromkeys(parameters, 0), {}, set()
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
        parameter, gradient = self._parameters[name], self._grad(name)
        assert gradient is not None
        self._passes[name] += 1
        if self._passes[name] > self._micro_batches:
            raise RuntimeError(f"{name} got a gradient in more backward passes than start_step named micro-batches")
        if self._accumulates(name):
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
        gradient = self._grad(name)
        assert gradient is not None
        self._buffers[name].add_(gradient)
        self._parameters[name].grad = None

    def of(self, name: str) -> Tensor | None:
        """What this process has of the sum of a parameter's gradients in this step; None if there were none."""
        if name in self._buffers:
            return self._buffers[name]
        if self._accumulates(name) and name in self._accumulators:
            return self._accumulators[name] if self._passes[name] else None
        return self._grad(name)

    def complete(self, name: str) -> Tensor:
        """The same once the last backward pass is over, where there were gradients: that of the global batch."""
        gradient = self.of(name)
        assert gradient is not None
        if not self._parts.is_summed(name) and name not in self._summed:
            self._parts.sum_(gradient)
            self._summed.add(name)
        return gradient

    def measure(self, name: str) -> None:
        """Let a parameter's gradient, which is complete, count in `norm`."""
        self._norms[name] = torch.linalg.vector_norm(self.complete(name), dtype=torch.float32)

    def measure_and_drop(self, name: str) -> None:
        """Count a gradient in `norm` as if it had never been there otherwise."""
        gradient = self._buffers[name] if name in self._buffers else self._grad(name)
        assert gradient is not None
        if not self._parts.is_summed(name):
            gradient = gradient.float()
            self._parts.sum_(gradient)
        self._norms[name] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        if name in self._buffers:
            self._buffers[name].zero_()
        self._parameters[name].grad = None

    def norm(self, name: str | None = None) -> Tensor:
        """L2 norm, an fp32 scalar, of all gradients that were measured, or of one of them.

        It is the norm of their norms, in the order of the names.
        """
        names = sorted(self._norms) if name is None else [name]
        if names:
            norms = self._parts.norms(names, torch.stack([self._norms[name] for name in names]))
            return torch.linalg.vector_norm(norms)
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
        gradients = [gradient for name in self._parameters if (gradient := self._grad(name)) is not None]
        return [*gradients, *self._accumulators.values(), *self._buffers.values()]

    def _grad(self, name: str) -> Tensor | None:
        gradient = self._parameters[name].grad
        return None if gradient is None else self._parts.local(gradient)

    def _accumulates(self, name: str) -> bool:
        """Whether a parameter's gradient goes to an fp32 accumulator."""
        if self._parameters[name].dtype == torch.float32:
            return False
        return self._micro_batches > 1 or not self._parts.is_summed(name)

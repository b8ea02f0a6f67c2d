"""What one process holds of the parameters that train: everything, or its part where several processes share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """Where a process's entries of a flat tensor lie in the whole one."""

    first: int
    """Number of the first entry."""
    total: int
    """Entries of the whole tensor."""


class Parts:
    """Of one process, which holds every parameter whole. `ShardedModel` is that of several."""

    def local(self, tensor: Tensor) -> Tensor:
        """This process's entries of a parameter or of its gradient, as a plain tensor in the same memory."""
        return tensor

    def span(self, name: str, parameter: Tensor) -> Span:
        """Where the entries that this process holds of the parameter called `name` lie in it."""
        return Span(0, parameter.numel())

    def takes_buffer(self, name: str) -> bool:
        """Whether kernels may add this parameter's gradient to a buffer, in place of `.grad`."""
        return True

    def is_summed(self, name: str) -> bool:
        """Whether a complete gradient of this parameter is that of the global batch, not of this process's share."""
        return True

    def sum_(self, gradient: Tensor) -> None:
        """Add up, in place, the shares that all processes have of a gradient that is not summed."""

    def norms(self, names: Sequence[str], norms: Tensor) -> Tensor:
        """L2 norms of whole gradients.

        Args:
            names: of the parameters, in the same order in every process.
            norms: [len(names)] fp32: of what this process holds of them.
        """
        return norms


def cut(tensor: Tensor, own: Tensor, span: Span | None) -> Tensor:
    """The entries of a whole tensor that stand for `own`, in its shape; all of them where `span` is None."""
    return tensor if span is None else tensor.reshape(-1)[span.first : span.first + own.numel()].view(own.shape)


def local_rows(rows: int, processes: int) -> int:
    """Rows that FSDP2 gives to the first process of several, the most that any gets."""
    return -(-rows // processes)


WHOLE = Parts()
"""Of a run of one process."""

"""Follow what the tensors of a computation take without taking it: on `meta`, or under FakeTensorMode."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.launch import Launch

Kind = Literal["weights", "masters", "moments", "gradients", "activations", "logits", "workspace", "other"]
"""What memory is for. Workspace is what backward and the optimizer take beside gradients: gradients of activations,
and what is computed again."""

STATE: tuple[Kind, ...] = ("weights", "masters", "moments", "gradients")
"""Kinds that grow with the parameters and not with the batch."""


class Costs:
    """FLOPs, memory traffic and estimated time of operations, by moment.

    Args:
        seconds: of an operation by its kind ("product", "fp8 product", "attention" or "pass" over memory), FLOPs and
            bytes.
    """

    def __init__(self, seconds: Callable[[str, int, int], float]) -> None:
        self._seconds = seconds
        self.flops: dict[str, int] = {}
        """Of matrix products and attention."""
        self.seconds: dict[str, float] = {}

    def add(self, moment: str, kind: str, flops: int, nbytes: int) -> None:
        """Count one operation."""
        self.flops[moment] = self.flops.get(moment, 0) + flops
        self.seconds[moment] = self.seconds.get(moment, 0.0) + self._seconds(kind, flops, nbytes)


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operations within it make, until the last tensor of each is gone.

    Args:
        device: type of the tensors that count, "meta" or "cpu".
        granularity: sizes are rounded up to multiples of it, as an allocator does.
        costs: told of every operation too.
    """

    def __init__(self, device: str, *, granularity: int = 1, costs: Costs | None = None) -> None:
        super().__init__()
        self._device, self._granularity, self.costs = device, granularity, costs
        self._sizes: dict[int, tuple[int, Kind]] = {}
        self.kind: Kind = "other"
        """What is allocated from now on is for, where its shape does not tell."""
        self.moment = "setup"
        """Name of what is going on."""
        self.logit_columns: int | None = None
        """Matrices with so many columns are logits."""
        self.live: dict[Kind, int] = {}
        """Bytes by kind."""
        self._total = self._highest = 0
        self.peak: dict[Kind, int] = {}
        """The same when their sum was highest."""
        self.peak_moment = self.moment
        self.most_working = 0
        """Highest sum of all kinds but `STATE`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _aten.nonzero.default:  # how many there are is not known without contents: none
            result = args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        else:
            result = func(*args, **(kwargs or {}))
        fresh = sum([self._found(tensor) for tensor in _tensors(result)])
        if self.costs is not None:
            self._count(func, args, kwargs or {}, result, fresh)
        return result

    def append(self, launch: Launch) -> None:
        """Take a start of a kernel, as `launches_sent_to` sends it: one pass over all its arguments."""
        if self.costs is not None:
            _, _, args, options = launch
            flops = options.get("flops", 0)
            self.costs.add(self.moment, "attention" if flops else "pass", flops, sum(map(_nbytes, args)))

    def label(self, tensor: Tensor, kind: Kind) -> None:
        """Say what a tensor that exists is for."""
        key = tensor.untyped_storage()._cdata
        if key in self._sizes:
            size, before = self._sizes[key]
            self._sizes[key] = size, kind
            self.live[before] -= size
            self.live[kind] = self.live.get(kind, 0) + size

    def start_over(self) -> None:
        """Forget the peaks."""
        self._take_peak()
        self.most_working = self._working()

    def _take_peak(self) -> None:
        self.peak, self.peak_moment, self._highest = dict(self.live), self.moment, self._total

    def _working(self) -> int:
        return self._total - sum(self.live.get(kind, 0) for kind in STATE)

    def _found(self, tensor: Tensor) -> bool:
        """Count the tensor's storage if it is new."""
        if tensor.device.type != self._device:
            return False
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        is_logits = tensor.dim() == 2 and tensor.shape[1] == self.logit_columns and self.kind == "activations"
        kind: Kind = "logits" if is_logits else self.kind
        self._sizes[key] = size, kind
        weakref.finalize(storage, self._gone, key)
        self.live[kind] = self.live.get(kind, 0) + size
        self._total += size
        if self._total > self._highest:
            self._take_peak()
        self.most_working = max(self.most_working, self._working())
        return True

    def _gone(self, key: int) -> None:
        size, kind = self._sizes.pop(key)
        self.live[kind] -= size
        self._total -= size

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, fresh: int) -> None:
        if func.overloadpacket in _FREE or (not fresh and func.is_view):
            return
        assert self.costs is not None
        nbytes = sum(map(_nbytes, _tensors((*args, *kwargs.values()))))
        nbytes += sum(map(_nbytes, _tensors(result))) if fresh else 0
        flops = _product_flops(func, args)
        product = "fp8 product" if func.overloadpacket is _aten._scaled_mm else "product"
        self.costs.add(self.moment, product if flops else "pass", flops, nbytes)


_aten = torch.ops.aten
_FREE = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.detach, _aten.set_, _aten.lift}
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten._scaled_mm: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten.baddbmm: 1}
"""Matrix products by the place of their left factor."""


def _product_flops(func: Any, args: tuple[Any, ...]) -> int:
    if (place := _PRODUCTS.get(func.overloadpacket)) is None:
        return 0
    left, right = args[place], args[place + 1]
    return 2 * left.numel() * right.shape[-1]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors among operation arguments or results, which nest lists at most."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)


def _nbytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def measured_peak(run: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had handed out at once while `run` ran, by its own events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # type: ignore[attr-defined]
        highest = max(highest, now)
    return highest

"""Saved activations in host memory between forward and backward.

What a layer saves is copied to pinned memory, on a stream of its own, while the next layer computes, and fetched back,
one layer ahead, while the layer behind runs its backward. Two layers' activations are on the GPU at once in either
direction; those of the last layer never leave. The copies cost time on the bus in place of FLOPs: 94 kB a token and
layer in bf16 at SOLAR's shape are 14 ms for 8,192 tokens at 55 GB/s, each way, and a layer that computes for less time
waits.

On a CPU there are no streams and the copies are made at once, which is how the tests check everything but the overlap:
that has not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_LEAST_BYTES = 64 << 10
"""Smaller tensors stay: a copy of its own would take longer than it is worth."""


class _Storage:
    """One storage of saved tensors: on its device, then in host memory alone, then on its device again."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        self.on_device: Tensor | None = whole.set_(storage, 0, (storage.nbytes(),), (1,))
        self.on_host: Tensor | None = None


class _Group:
    """The storages that one layer saves."""

    def __init__(self, before: _Group | None) -> None:
        self.before = before
        # Weak, so that each storage goes with the last operation of the backward pass that reads it.
        self.references: list[weakref.ref[_Storage]] = []
        self.copied: torch.Event | None = None
        self.fetched: torch.Event | None = None

    def storages(self) -> list[_Storage]:
        return [storage for reference in self.references if (storage := reference()) is not None]


class _Saved(NamedTuple):
    """What autograd keeps in place of a tensor: a view of a storage that may be elsewhere."""

    storage: _Storage
    group: _Group
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


def _number(tensor: Tensor) -> int:
    """Of the tensor's storage; unique as long as that, or a weak reference to it, exists."""
    return tensor.untyped_storage()._cdata


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class HostOffload:
    """Keeps what layers save for backward in host memory, for one forward pass and its backward.

    Args:
        device: of the activations.
        shared: tensors that all layers save: they stay where they are, as parameters and small tensors do.

    Example:
        offload = HostOffload(x.device, shared=(cos, sin))
        for layer in layers:
            with offload.layer(layer):
                x = layer(x, cos, sin)
    """

    def __init__(self, device: torch.device, shared: Sequence[Tensor] = ()) -> None:
        self._device, self._stream = device, _copy_stream(device)
        self._shared = {_number(tensor) for tensor in shared}
        self._stay = self._shared
        # By storage and version of its contents; the weak reference keeps the storage's number from another's use.
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[_Storage], _Group]] = {}
        self._group: _Group | None = None

    @contextlib.contextmanager
    def layer(self, module: nn.Module) -> Iterator[None]:
        """Take care of what `module` saves within: one module after the other, in the order of the forward pass."""
        before = self._group
        if before is not None:  # not at the end of its own layer: the last one's stay, backward begins with them
            self._copy_out(before)
        self._group = _Group(before)
        self._stay = self._shared | {_number(parameter) for parameter in module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        if before is not None:
            self._release(before)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        size = tensor.untyped_storage().nbytes()
        if size < _LEAST_BYTES or tensor.device != self._device or _number(tensor) in self._stay:
            return tensor
        assert self._group is not None
        key = (_number(tensor), tensor._version)
        _, reference, group = self._known.get(key, (None, None, self._group))
        storage = None if reference is None else reference()
        if storage is None:
            storage, group = _Storage(tensor), self._group
            group.references.append(weakref.ref(storage))
            self._known[key] = StorageWeakRef(tensor.untyped_storage()), weakref.ref(storage), group
        return _Saved(storage, group, tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        group = saved.group
        self._fetch(group)
        if group.before is not None:
            self._fetch(group.before)
        if group.fetched is not None:
            torch.cuda.current_stream(self._device).wait_event(group.fetched)
        assert saved.storage.on_device is not None
        tensor = torch.empty(0, dtype=saved.dtype, device=self._device)
        return tensor.set_(saved.storage.on_device.untyped_storage(), saved.offset, saved.size, saved.stride)

    def _copy_out(self, group: _Group) -> None:
        """Start copying a layer's storages to the host, behind everything that has been started so far."""
        with self._copying():
            for storage in group.storages():
                assert storage.on_device is not None
                like = storage.on_device
                storage.on_host = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
                if not like.is_meta:  # which has a size and no content
                    storage.on_host.copy_(like, non_blocking=True)
            group.copied = None if self._stream is None else self._stream.record_event()

    def _release(self, group: _Group) -> None:
        """Give a layer's memory to what is started from now on."""
        # Waiting, and not `record_stream`, bounds the memory where copies are slower than layers.
        if group.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(group.copied)
        for storage in group.storages():
            storage.on_device = None

    def _fetch(self, group: _Group) -> None:
        """Start copying back what is in host memory alone."""
        missing = [storage for storage in group.storages() if storage.on_device is None]
        if not missing:
            return
        # Memory of the stream that computes: the copies wait below for all that used it before.
        hosts = [storage.on_host for storage in missing if storage.on_host is not None]
        targets = [torch.empty_like(host, device=self._device) for host in hosts]
        with self._copying():
            for storage, host, target in zip(missing, hosts, targets, strict=True):
                if not target.is_meta:
                    target.copy_(host, non_blocking=True)
                if self._stream is not None:  # backward may end before it reads what was fetched ahead for it
                    target.record_stream(self._stream)
                storage.on_device = target
            group.fetched = None if self._stream is None else self._stream.record_event()

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """What is started within runs on the stream for copies, behind what the current stream was given before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

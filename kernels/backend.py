"""Which implementation of an operation runs: its Triton kernels, or plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from .launch import INTERPRETED, TRITON_INSTALLED, capturing, on_gpu

Backend = Literal["auto", "triton", "torch"]
"""`auto`: Triton for tensors on a GPU, where it is installed, else PyTorch. The other two insist."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_backend: Backend = "auto"


def set_kernel_backend(backend: Backend) -> None:
    """Choose the implementation of every operation whose call names none.

    Raises:
        ValueError: for a name that is not one of `Backend`'s.
    """
    global _backend  # noqa: PLW0603
    _backend = _checked(backend)


def current_backend() -> Backend:
    """The choice of `set_kernel_backend`."""
    return _backend


@contextlib.contextmanager
def kernel_backend(backend: Backend) -> Iterator[None]:
    """`set_kernel_backend` for the length of a `with` block; backward passes inside it are meant, too."""
    previous = _backend
    set_kernel_backend(backend)
    try:
        yield
    finally:
        set_kernel_backend(previous)


def use_triton(backend: Backend | None, *tensors: Tensor | None) -> bool:
    """Whether an operation on `tensors` runs its Triton kernels.

    Args:
        backend: of this call; None for that of `set_kernel_backend`.
        tensors: the floating tensors that the kernels would read; None entries are skipped.

    Raises:
        RuntimeError: if Triton is asked for where it is not installed, or for CPU tensors outside its interpreter.
        TypeError: if Triton is asked for tensors that are not fp32, bf16 or fp16.
        ValueError: if `backend` is not one of `Backend`'s.
    """
    chosen = _backend if backend is None else _checked(backend)
    if chosen == "torch":
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    all_on_gpu = all(map(on_gpu, given))
    floats = all(tensor.dtype in _FLOATS for tensor in given)
    if chosen == "auto":
        return TRITON_INSTALLED and all_on_gpu and floats
    if not TRITON_INSTALLED:
        raise RuntimeError('the backend "triton" needs the package triton, which is not installed')
    if not floats:
        kinds = ", ".join(sorted({str(tensor.dtype) for tensor in given}))
        raise TypeError(f'the backend "triton" takes fp32, bf16 and fp16 tensors, not {kinds}; use "torch" or "auto"')
    if not (all_on_gpu or INTERPRETED or capturing()):
        raise RuntimeError(
            'the backend "triton" runs on a GPU; on a CPU it needs Triton\'s interpreter: set TRITON_INTERPRET=1 '
            "before Python starts"
        )
    return True


def _checked(backend: Backend) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"kernel backend {backend!r} is not one of {', '.join(get_args(Backend))}")
    return backend

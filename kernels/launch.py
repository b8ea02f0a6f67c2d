"""How every Triton kernel here is started, and how the starters become operators that `torch.compile` knows.

Triton is optional at import: where it is missing, the kernels are placeholders that nothing can start.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    TRITON_INSTALLED = True
else:
    try:
        import triton
        import triton.language as tl

        TRITON_INSTALLED = True
    except ImportError:

        class _Absent:
            """Stands for Triton's modules and all they hold, so that decorated kernels can be defined."""

            def __getattr__(self, name: str) -> _Absent:
                return self

            def __call__(self, *args: object, **kwargs: object) -> _Absent:
                return self

        triton = tl = _Absent()
        TRITON_INSTALLED = False

INTERPRETED = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU and slowly; decided when kernels are defined."""

Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""(kernel, grid, arguments, constants and options) of one start."""


class LaunchSink(Protocol):
    """Takes what would start."""

    def append(self, launch: Launch, /) -> None:
        """Called once a start, in order."""
        ...


_captured: LaunchSink | None = None
_captured_capability = 90


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on the device of its first tensor argument; inside `captured_launches`, only write that down.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: programs along each axis; with none along one, nothing starts.
        args: the kernel's arguments in order.
        options: its constants by name, and `num_warps` and `num_stages`.
    """
    if 0 in grid:
        return
    # Stated, because Triton 3.10 changes the default: multiplications and additions may be fused.
    options.setdefault("enable_fp_fusion", True)
    if _captured is not None:
        _captured.append((kernel, grid, args, options))
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton starts kernels on the current device, whatever the tensors' is
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@contextlib.contextmanager
def captured_launches(capability: int = 90) -> Iterator[list[Launch]]:
    """Collect what would start instead of starting it: for compiling ahead of time with tensors on `meta`.

    Args:
        capability: what `compute_capability` says meanwhile.
    """
    launches: list[Launch] = []
    with launches_sent_to(launches, capability):
        yield launches


@contextlib.contextmanager
def launches_sent_to(sink: LaunchSink, capability: int = 90) -> Iterator[None]:
    """`captured_launches` into a sink, which need not hold on to the tensors among the arguments."""
    global _captured, _captured_capability
    previous = _captured, _captured_capability
    _captured, _captured_capability = sink, capability
    try:
        yield
    finally:
        _captured, _captured_capability = previous


def capturing() -> bool:
    """Whether `captured_launches` is in effect."""
    return _captured is not None


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is treated as on a GPU: it is on one, or on `meta` while starts are captured."""
    return tensor.is_cuda or (tensor.is_meta and capturing())


def kernel_op(*, fake: Callable[..., Any], mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Make a function that starts kernels the operator `redwhale::NAME`, opaque to `torch.compile`.

    Its namespace is the package that the function is in: of two operators of one name, torch destroys the first, and a
    copy of these files may be imported besides, be it because Hugging Face's libraries look for a package `kernels`.

    Args:
        fake: takes the same arguments and returns empty tensors of the results' shapes, dtypes and strides.
        mutates_args: names of the arguments that it writes to.
    """

    def decorate(function: Callable) -> Callable:
        # getattr, because a function's type does not promise a name.
        name = getattr(function, "__name__")  # noqa: B009
        package = function.__module__.partition(".")[0]
        operator = torch.library.custom_op(f"{package}::{name}", function, mutates_args=mutates_args)
        operator.register_fake(fake)

        def call(*args: Any) -> Any:
            # Operators answer tensors on meta with their fake; the kernels are wanted.
            return function(*args) if capturing() else operator(*args)

        call.__name__, call.__doc__ = name, function.__doc__
        return call

    return decorate


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; those of an H100 for `meta`; few on a CPU, where programs run in turn."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 132 if tensor.is_meta else 3


def compute_capability(tensor: Tensor) -> int:
    """Of the tensor's GPU, such as 80 (Ampere), 90 (Hopper) or 100 (Blackwell): what block sizes depend on."""
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    return _captured_capability


def ceil_div(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """`x` [..., C] as [rows, C] with entries of a row next to each other; copied only where strides forbid a view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()

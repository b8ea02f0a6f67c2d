"""Variable-length attention by different libraries, behind one signature, and the formula they all compute.

Every backend takes q [N, heads, D], k and v [N, kv_heads, D], cu_seqlens [documents + 1] int32, the length of
the longest document and the sliding window, and returns [N, heads, D].
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..kernels.launch import launch
from .errors import CheckpointError

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, int, int | None], Tensor]

_preferred = "auto"


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, sliding_window: int | None
) -> Tensor:
    """softmax(q·kᵀ/√D + mask)·v with the mask written out, [heads, N, N]: slow, in the inputs' own precision.

    A key is seen by the queries of its own document that are not before it and less than `sliding_window` behind it.
    """
    tokens = q.shape[0]
    position = torch.arange(tokens, device=q.device)
    document = torch.bucketize(position, cu_seqlens[1:].to(position), right=True)
    behind = position[:, None] - position[None, :]
    visible = (document[:, None] == document[None, :]) & (behind >= 0)
    if sliding_window is not None:
        visible &= behind < sliding_window
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, sliding_window: int | None
) -> Tensor:
    """The flash-attn package (Dao 2023, arXiv 2307.08691); bf16 or fp16 on a GPU."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        causal=True,
        window_size=_window(sliding_window),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, sliding_window: int | None
) -> Tensor:
    """The flash attention inside torch (`torch.nn.attention.varlen`); bf16 or fp16 on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": _window(sliding_window)}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # before torch 2.12
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)  # type: ignore[return-value]


class _FlashShapes(torch.autograd.Function):
    """The tensors of flash attention without their contents: what it returns, keeps for backward and works in."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, pairs: int) -> Tensor:
        """[N, heads, D]."""
        output = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.flops = 4 * pairs * q.shape[1] * q.shape[2]  # of the two products
        launch("flash attention", (1,), q, k, v, output, lse, flops=ctx.flops)
        return output

    @staticmethod
    def backward(ctx, *grads: Tensor):
        q, k, v, output, lse = ctx.saved_tensors
        # Sums over blocks of keys in fp32, and of k and v one gradient for each query head, added up at the end.
        sums, deltas = torch.empty_like(q, dtype=torch.float32), torch.empty_like(lse)
        expanded = [torch.empty_like(q) for x in (k, v) if x.shape[1] != q.shape[1]]
        results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # Four products, and the scores once more.
        tensors = (*grads, q, k, v, output, lse, sums, deltas, *expanded, *results)
        launch("flash attention, backward", (1,), *tensors, flops=ctx.flops * 5 // 2)
        return *results, None


def flash_shapes(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], sliding_window: int | None) -> Tensor:
    """Stands for the flash-attn package, version 2, where kernels are captured and tensors have no content."""
    triangle = lambda n: n * (n + 1) // 2  # noqa: E731
    pairs = sum(triangle(n) - triangle(max(0, n - (sliding_window or n))) for n in lengths)
    return _FlashShapes.apply(q, k, v, pairs)  # type: ignore[return-value]


def _window(sliding_window: int | None) -> tuple[int, int]:
    """(left, right) reach of a causal window: flash attention counts the keys besides the query's own."""
    return (-1, 0) if sliding_window is None else (sliding_window - 1, 0)


BACKENDS: dict[str, Backend] = {"flash-attn": flash_attn, "torch-varlen": torch_varlen, "reference": reference}
"""Backends that take cu_seqlens. "sdpa", a call of torch's own attention for each document, needs none of it."""


def set_attention_backend(name: str) -> None:
    """Choose the backend of all calls that do not name one: "auto", "sdpa" or one of `BACKENDS`.

    Raises:
        CheckpointError: for an unknown name.
    """
    global _preferred  # noqa: PLW0603 (one switch for the process, as documented)
    if name not in ("auto", "sdpa", *BACKENDS):
        raise CheckpointError(f"unknown attention backend {name!r}; known: auto, sdpa, {', '.join(BACKENDS)}")
    _preferred = name


def resolve_backend(name: str | None, q: Tensor) -> str:
    """The backend to use for `q`: the one named, or the process' choice, or the fastest that can run.

    "auto" is flash-attn where it is installed, else torch's varlen attention, for bf16 and fp16 on a GPU; sdpa
    for all else.
    """
    name = name or _preferred
    if name != "auto":
        return name
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return "flash-attn" if _installed("flash_attn") else "torch-varlen"
    return "sdpa"


@cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None

"""AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) with moments in 8 bits and exact masters of bf16 weights.

With g the gradient, m = β₁·m + (1 − β₁)·g and v = β₂·v + (1 − β₂)·g²; weights lose lr·(weight_decay·w + m / (1 − β₁ᵗ)
/ (sqrt(v / (1 − β₂ᵗ)) + eps)), with the m and v of this step, before they are rounded. Kept between steps are codes
of m and of r = sqrt(v), one byte each with one exponent for 256 entries (`minifloat`; keeping optimizer states in 8
bits by block is from Dettmers et al. 2021, arXiv 2110.02861): 1 + 3 + 4 bits for m, 3 + 5 for r. A positive r never
becomes 0, because m is divided by it.

Rounding has to be unbiased. In a step r loses at most 1 − sqrt(β₂) of itself, 0.05% for β₂ = 0.999, while codes lie
1.6% to 3.1% apart: rounded to nearest, r could never fall. Dithered, it follows v. The noise this adds to a step is
3% to 4% of its length from m, and 3% to 4% from r (bench/adamw_8bit.py).

A bf16 weight is the upper half of an fp32 master, rounded to nearest, ties away from zero. 16 more bits keep what
that rounding took away, so that together they are the master, exactly: `masters="split"`. With `masters="stochastic"`
there is none, and the weights are what the dither rounds.

All results are a function of the inputs, the seed, the tensor's number, its step and the entry: training resumes with
the same bits, and both backends compute the same ones, for which multiplications and additions are not fused. A
gradient that is not finite makes its weight NaN in the same step, and the 256 weights of its block in the next, until
weights and state are replaced. A gradient above 10^19, whose square overflows, spares its weight at first and does
the same in the next step.

Memory-bound: of each entry weight, low half and two codes are read and written, and the gradient is read, 16 bytes
with fp32 gradients and 14 with bf16; fp32 moments and masters take 30 and 28, which includes writing the bf16 weight.
The state is 2.01 bytes an entry beside the bf16 weight, 4.01 with low halves, against 12. About 20 FLOPs and 100
instructions an entry hide behind that. One launch updates all tensors of the same dtypes; each program finds its
tensor's addresses in a table. Tensors at addresses that are no multiple of 16 bytes are updated by slower accesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .backend import Backend, use_triton
from .bf16_masters import fp32_masters, store_nearest_, store_stochastic_
from .launch import ceil_div, kernel_op, launch, tl, triton
from .minifloat import (
    BLOCK,
    dither_of,
    minifloat_decode,
    minifloat_encode,
    random_words,
    torch_decode,
    torch_dither,
    torch_encode,
    torch_random_words,
)

Masters = Literal["split", "stochastic"]
_FIRST = (3, 4)
"""Exponent and mantissa bits of the codes of m."""
_ROOT = (3, 5)
"""Of the codes of sqrt(v)."""
_TILE_BLOCKS = 4
_TILE = _TILE_BLOCKS * BLOCK
"""Entries that a program updates."""
_CHUNK = 2**20
"""Entries that the PyTorch backend updates at a time: they take about 100 bytes each meanwhile."""


class MomentCodes(NamedTuple):
    """What is kept of one tensor of n entries between steps; zeros before the first."""

    first: Tensor
    """uint8 [n]: codes of the first moment m."""
    first_exponents: Tensor
    """uint8 [ceil(n / 256)]"""
    root: Tensor
    """uint8 [n]: codes of sqrt(v), v being the second moment."""
    root_exponents: Tensor
    """uint8 [ceil(n / 256)]"""
    low: Tensor
    """int16 [n], or [0] without masters: the fp32 master's bits less the weight's, which are the upper half of 32."""

    @classmethod
    def zeros(cls, param: Tensor, masters: Masters = "split") -> MomentCodes:
        """Those of `param` before its first step."""
        entries, blocks = param.numel(), ceil_div(param.numel(), BLOCK)
        kept_low = entries if masters == "split" and param.dtype == torch.bfloat16 else 0
        new = {"dtype": torch.uint8, "device": param.device}
        return cls(
            torch.zeros(entries, **new),
            torch.full((blocks,), 1, **new),
            torch.zeros(entries, **new),
            torch.full((blocks,), 1, **new),
            torch.zeros(kept_low, dtype=torch.int16, device=param.device),
        )


class AdamWSettings(NamedTuple):
    """Of one tensor in one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """From 1."""
    seed: int
    """Of the dither, from 0 to 2^63 − 1."""
    number: int
    """Of the tensor, below 2^32: tensors with the same seed and number are dithered alike."""
    first: int = 0
    """Entry of the whole tensor that the given part of it begins with, a multiple of 256."""

    def factors(self) -> tuple[float, ...]:
        """β₁, 1 − β₁, β₂, 1 − β₂, lr·weight_decay, lr / (1 − β₁ᵗ), 1 / sqrt(1 − β₂ᵗ), eps: what the kernels read."""
        return (
            *(self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.lr * self.weight_decay),
            *(self.lr / (1 - self.beta1**self.step), (1 - self.beta2**self.step) ** -0.5, self.eps),
        )


@triton.jit
def _load(pointers, inside, WHOLE: tl.constexpr):
    return tl.load(pointers) if WHOLE else tl.load(pointers, inside, other=0)


@triton.jit
def _store(pointers, values, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, inside)


@triton.jit
def _entries_at(column, start, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Pointer to entry `start` of the tensor whose address is in the table at `column`."""
    first = tl.load(column).to(tl.pointer_type(KIND))  # pyright: ignore[reportArgumentType]
    # Without alignment stated, every entry would be a memory access of its own.
    return (tl.multiple_of(first, 16) if WHOLE else first) + start


@triton.jit
def _update_tile(
    row, factors, scale, start, entries,
    FP32_WEIGHTS: tl.constexpr, MASTERS: tl.constexpr, FP32_GRADS: tl.constexpr, HAS_SCALE: tl.constexpr,
    WHOLE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Update the entries of K blocks from `start`: all of them and with aligned accesses if WHOLE."""
    block = tl.arange(0, K)[:, None]
    entry = block * 256 + tl.arange(0, 256)[None, :]
    inside, blocks_inside = start + entry < entries, start + block * 256 < entries

    grads = _entries_at(row + 1, start, tl.float32 if FP32_GRADS else tl.bfloat16, WHOLE) + entry
    grad = _load(grads, inside, WHOLE).to(tl.float32)
    if HAS_SCALE:
        grad = grad * tl.load(scale)
    if FP32_WEIGHTS:
        weights = _entries_at(row, start, tl.float32, WHOLE) + entry
        weight = _load(weights, inside, WHOLE)
    else:
        weights = _entries_at(row, start, tl.int16, WHOLE) + entry
        weight = _load(weights, inside, WHOLE).to(tl.int32) << 16
        if MASTERS:
            lows = _entries_at(row + 2, start, tl.int16, WHOLE) + entry
            weight += _load(lows, inside, WHOLE).to(tl.int32)
        weight = weight.to(tl.float32, bitcast=True)

    first_codes = _entries_at(row + 3, start, tl.uint8, WHOLE) + entry
    first_exponents = _entries_at(row + 4, start // 256, tl.uint8, False) + block
    root_codes = _entries_at(row + 5, start, tl.uint8, WHOLE) + entry
    root_exponents = _entries_at(row + 6, start // 256, tl.uint8, False) + block
    first = minifloat_decode(
        _load(first_codes, inside, WHOLE),
        _load(first_exponents, blocks_inside, WHOLE),
        EXPONENT_BITS=3,
        MANTISSA_BITS=4,
    )
    root = minifloat_decode(
        _load(root_codes, inside, WHOLE), _load(root_exponents, blocks_inside, WHOLE), EXPONENT_BITS=3, MANTISSA_BITS=5
    )

    first = tl.load(factors) * first + tl.load(factors + 1) * grad
    root = tl.sqrt_rn(tl.load(factors + 2) * (root * root) + tl.load(factors + 3) * (grad * grad))
    denominator = root * tl.load(factors + 6) + tl.load(factors + 7)
    change = tl.load(factors + 4) * weight + tl.div_rn(tl.load(factors + 5) * first, denominator)
    weight = weight - change

    step, number, seed = tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)
    drawn = start + tl.load(row + 12)
    if FP32_WEIGHTS:
        _store(weights, weight, inside, WHOLE)
    else:
        # A GPU's NaN has all mantissa bits set, and would be rounded up to -0.
        bits = weight.to(tl.int32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
        if MASTERS:
            high = (bits + 0x8000) >> 16
            _store(lows, (bits - (high << 16)).to(tl.int16), inside, WHOLE)
        else:
            dither = dither_of(random_words(seed, number, drawn, 1, K), step)
            high = (bits + (dither >> 16).to(tl.int32)) >> 16
        _store(weights, high.to(tl.int16), inside, WHOLE)

    words = random_words(seed, number, drawn, 0, K)
    codes, exponents = minifloat_encode(first, dither_of(words << 16, step), EXPONENT_BITS=3, MANTISSA_BITS=4)
    _store(first_codes, codes, inside, WHOLE)
    _store(first_exponents, exponents, blocks_inside, WHOLE)
    codes, exponents = minifloat_encode(root, dither_of(words, step), EXPONENT_BITS=3, MANTISSA_BITS=5)
    _store(root_codes, codes, inside, WHOLE)
    _store(root_exponents, exponents, blocks_inside, WHOLE)


@triton.jit
def _adamw_8bit(
    table, factors, owners, scale,
    FP32_WEIGHTS: tl.constexpr, MASTERS: tl.constexpr, FP32_GRADS: tl.constexpr, HAS_SCALE: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    if HAS_SCALE:  # noqa: SIM102 — Triton evaluates both sides of an `and`
        if tl.load(scale) != tl.load(scale):
            return
    program = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + program).to(tl.int64)
    row = table + owner * 13
    factors += owner * 8
    entries = tl.load(row + 7)
    start = (program - tl.load(row + 8)) * (K * 256)
    bits = tl.load(row) | tl.load(row + 1) | tl.load(row + 2) | tl.load(row + 3) | tl.load(row + 5)
    if (start + K * 256 <= entries) & ((bits & 15) == 0):
        _update_tile(
            row, factors, scale, start, entries, FP32_WEIGHTS, MASTERS, FP32_GRADS, HAS_SCALE, WHOLE=True, K=K
        )  # fmt: skip
    else:
        # Rare, at the ends of tensors: by the block, which keeps registers for the other case.
        for block in range(K):
            if start + block * 256 < entries:
                _update_tile(
                    row, factors, scale, start + block * 256, entries, FP32_WEIGHTS, MASTERS, FP32_GRADS, HAS_SCALE,
                    WHOLE=False, K=1
                )  # fmt: skip


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without the host waiting for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _fake_update(*args: Any) -> None:
    return None


@kernel_op(fake=_fake_update, mutates_args=("params", "first", "first_exponents", "root", "root_exponents", "low"))
def adamw_8bit_update(
    params: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    first_exponents: list[Tensor],
    root: list[Tensor],
    root_exponents: list[Tensor],
    low: list[Tensor],
    factors: Tensor,
    counters: Tensor,
    grad_scale: Tensor | None,
) -> None:
    kinds: dict[tuple[torch.device, bool, bool, bool], list[int]] = {}
    for i in (i for i, param in enumerate(params) if param.numel()):
        param = params[i]
        kind = param.device, param.dtype == torch.float32, low[i].numel() > 0, grads[i].dtype == torch.float32
        kinds.setdefault(kind, []).append(i)
    addressed = (params, grads, low, first, first_exponents, root, root_exponents)
    for (device, fp32_weights, masters, fp32_grads), members in kinds.items():
        tiles = [ceil_div(params[i].numel(), _TILE) for i in members]
        # Written anew each step: gradients move, and an address that outlives its tensor corrupts memory.
        columns = [[tensors[i].data_ptr() for i in members] for tensors in addressed]
        columns += [[params[i].numel() for i in members], [0, *accumulate(tiles[:-1])]]
        table = _sent(torch.cat((torch.tensor(columns).T, counters[members]), 1), device)
        device_factors = _sent(factors[members], device)
        owners = torch.repeat_interleave(_sent(torch.tensor(tiles, dtype=torch.int32), device), output_size=sum(tiles))
        launch(
            *(_adamw_8bit, (sum(tiles),)),
            *(table, device_factors, owners),
            device_factors if grad_scale is None else grad_scale.to(device, torch.float32),
            FP32_WEIGHTS=fp32_weights,
            MASTERS=masters,
            FP32_GRADS=fp32_grads,
            HAS_SCALE=grad_scale is not None,
            K=_TILE_BLOCKS,
            num_warps=4,
            enable_fp_fusion=False,
        )


def _torch_update(
    param: Tensor, grad: Tensor, codes: MomentCodes, settings: AdamWSettings, scale: Tensor | None
) -> None:
    beta1, one_minus_beta1, beta2, one_minus_beta2, decay, rate, correction, eps = settings.factors()
    weights, grads = param.view(-1), grad.view(-1)
    skip = None if scale is None else scale.isnan()
    for begin in range(0, param.numel(), _CHUNK):
        part, blocks = slice(begin, begin + _CHUNK), slice(begin // BLOCK, (begin + _CHUNK) // BLOCK)
        g, entries = grads[part].float(), len(grads[part])
        if scale is not None:
            g = g * scale
        weight = fp32_masters(weights[part], codes.low[part])
        first = torch_decode(_blocks(codes.first[part]), codes.first_exponents[blocks, None], *_FIRST)
        root = torch_decode(_blocks(codes.root[part]), codes.root_exponents[blocks, None], *_ROOT)
        g = _blocks(g)
        first = first * beta1 + g * one_minus_beta1
        root = root * root * beta2 + g * g * one_minus_beta2
        # On a CPU, torch's fp32 square root may be off by a bit; that of float64 rounds to the right one.
        root = root.double().sqrt().float()
        change = _blocks(weight) * decay + first * rate / (root * correction + eps)
        new_weight = weight - change.view(-1)[:entries]
        # Unchanged masters are rounded to the weights they came from.
        weight = new_weight if skip is None else torch.where(skip, weight, new_weight)

        words = torch_random_words(
            settings.seed, settings.number, settings.first + begin, first.numel(), 0, grad.device
        ).view(-1, BLOCK)
        for values, dither, bits, kept, exponents in (
            (first, words << 16, _FIRST, codes.first, codes.first_exponents),
            (root, words, _ROOT, codes.root, codes.root_exponents),
        ):
            new, new_exponents = torch_encode(values, torch_dither(dither, settings.step), *bits)
            _keep_or_put(kept[part], new.view(-1)[:entries], skip)
            _keep_or_put(exponents[blocks], new_exponents.view(-1), skip)

        if param.dtype == torch.float32:
            weights[part] = weight
        elif len(codes.low):
            store_nearest_(weights[part], weight, codes.low[part])
        else:
            counter = {"seed": settings.seed, "number": settings.number, "step": settings.step}
            store_stochastic_(weights[part], weight, first=settings.first + begin, **counter)


def _keep_or_put(kept: Tensor, new: Tensor, skip: Tensor | None) -> None:
    kept.copy_(new if skip is None else torch.where(skip, kept, new))


def _blocks(entries: Tensor) -> Tensor:
    """[blocks, 256] of flat `entries`, with zeros behind the last."""
    return nn.functional.pad(entries, (0, -len(entries) % BLOCK)).view(-1, BLOCK)


@torch.no_grad()
def adamw_8bit_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    codes: Sequence[MomentCodes],
    settings: Sequence[AdamWSettings],
    grad_scale: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> None:
    """One step of AdamW on all `params`, in place; on a GPU one launch for each combination of dtypes.

    Args:
        params: contiguous, bf16 or fp32, each of fewer than 2^34 entries.
        grads: of the params' shapes and devices, bf16 or fp32.
        codes: of the moments, as from `MomentCodes.zeros`; overwritten. What `low` holds decides over masters.
        settings: of each tensor.
        grad_scale: one number on the device that gradients are multiplied by, such as for clipping; None for 1. If it
            is NaN, the step changes nothing, weights and codes included.
        backend: see `Backend`; None for the global choice.

    Raises:
        TypeError: for params or gradients of other dtypes.
        ValueError: for params that are not contiguous, gradients of other shapes or devices, settings out of range.
    """
    for param, grad, setting in zip(params, grads, settings, strict=True):
        check_param(param)
        if grad.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"a gradient is {grad.dtype}; AdamW with 8-bit moments takes bf16 and fp32 gradients")
        if grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"a gradient of shape {tuple(grad.shape)} on {grad.device} does not fit its parameter of shape "
                f"{tuple(param.shape)} on {param.device}"
            )
        if setting.step < 1 or not 0 <= setting.number < 2**32 or not 0 <= setting.seed < 2**63:
            raise ValueError(
                f"step {setting.step}, seed {setting.seed} or tensor number {setting.number} is out of range"
            )
        if setting.first % BLOCK:
            raise ValueError(f"a part begins with entry {setting.first}, which cuts one of its blocks of {BLOCK}")
    if grad_scale is not None and grad_scale.numel() != 1:
        raise ValueError(f"grad_scale has {grad_scale.numel()} entries; it is one number for all gradients")
    grads = [grad.contiguous() for grad in grads]
    if params and use_triton(backend, *params):
        factors = torch.tensor([setting.factors() for setting in settings], dtype=torch.float32)
        counters = torch.tensor([(setting.step, setting.number, setting.seed, setting.first) for setting in settings])
        detached = [param.detach() for param in params]
        adamw_8bit_update(detached, grads, *map(list, zip(*codes, strict=True)), factors, counters, grad_scale)
        return
    for param, grad, kept, setting in zip(params, grads, codes, settings, strict=True):
        _torch_update(param, grad, kept, setting, grad_scale)


def check_param(param: Tensor) -> None:
    if param.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"a parameter is {param.dtype}; AdamW with 8-bit moments updates bf16 and fp32 parameters")
    if not param.is_contiguous():
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} is not contiguous; AdamW with "
            "8-bit moments updates contiguous memory: pass parameter.contiguous(), or whole rows of a matrix"
        )
    if param.numel() >= 2**34:
        raise ValueError(f"a parameter has {param.numel()} entries; at most 2^34 - 1 have random numbers of their own")

"""The operations of kernels/ at given shapes, each started once, for the script that compiles them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from redwhale.kernels.adamw_8bit_optimizer import AdamW8bit
from redwhale.kernels.dropout import dropout_seed, seeded_dropout
from redwhale.kernels.embedding import embedding
from redwhale.kernels.fp8_linear import quantise_rows, triton_transposed
from redwhale.kernels.launch import compute_capability
from redwhale.kernels.linear_cross_entropy import linear_cross_entropy
from redwhale.kernels.lora_linear import LoRAWeights, lora_linears
from redwhale.kernels.lora_mlp import lora_mlp
from redwhale.kernels.low_rank_gemm import CONFIGS, low_rank_gemm
from redwhale.kernels.rms_norm import add_rms_norm, rms_norm
from redwhale.kernels.rope import apply_rope, rope_cos_sin
from redwhale.kernels.row_range import row_range
from redwhale.kernels.swiglu import swiglu


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model and of the batch that goes through it."""

    tokens: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    ranks: tuple[int, ...]


SOLAR = Shapes(8192, 4096, 14_336, 32, 8, 128, 49_152, (16, 64, 128))
"""SOLAR-10.7B with RedWhale's vocabulary, padded, and 8,192 tokens."""

Run = Callable[[], object]
CASES: dict[str, Callable[[Shapes, torch.device, torch.dtype], Run]] = {}
"""By name: makes inputs of those shapes on that device, and returns forward and backward on them with Triton."""


def case(name: str) -> Callable[[Callable], Callable]:
    """Add a function to `CASES`."""

    def decorate(make: Callable[[Shapes, torch.device, torch.dtype], Run]) -> Callable:
        CASES[name] = make
        return make

    return decorate


def random(*shape: int, device: torch.device, dtype: torch.dtype, grad: bool = True) -> Tensor:
    """Normal numbers, or only their shape on `meta`."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)


@case("rms_norm")
def _rms_norm(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    x = random(shapes.tokens, shapes.hidden, device=device, dtype=dtype)
    weight = random(shapes.hidden, device=device, dtype=dtype)
    upstream = random(shapes.tokens, shapes.hidden, device=device, dtype=dtype, grad=False)
    return lambda: rms_norm(x, weight, backend="triton").backward(upstream)


@case("add_rms_norm")
def _add_rms_norm(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    x, residual = (random(shapes.tokens, shapes.hidden, device=device, dtype=dtype) for _ in range(2))
    weight = random(shapes.hidden, device=device, dtype=dtype, grad=False)
    upstream = random(shapes.tokens, shapes.hidden, device=device, dtype=dtype, grad=False)
    return lambda: torch.autograd.backward(add_rms_norm(x, residual, weight, backend="triton"), (upstream, upstream))


@case("seeded_dropout")
def _seeded_dropout(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    x = random(shapes.tokens, shapes.hidden, device=device, dtype=dtype)
    seed = dropout_seed(device)
    return lambda: seeded_dropout(x, seed, 0.05, backend="triton").backward(x.detach())


@case("rope")
def _rope(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    q = random(shapes.tokens, shapes.heads, shapes.head_dim, device=device, dtype=dtype)
    k = random(shapes.tokens, shapes.kv_heads, shapes.head_dim, device=device, dtype=dtype)
    frequencies = torch.ones(shapes.head_dim // 2, device=device)
    cos, sin = rope_cos_sin(torch.arange(shapes.tokens, device=device), frequencies)

    def run() -> None:
        for x in (q, k):
            apply_rope(x, cos, sin, backend="triton").backward(x.detach())
            apply_rope(x.detach(), cos, sin, inplace=True, backend="triton")

    return run


@case("embedding")
def _embedding(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    weight = random(shapes.vocabulary, shapes.hidden, device=device, dtype=dtype)
    input_ids = torch.randint(shapes.vocabulary, (shapes.tokens,), device=device)
    upstream = random(shapes.tokens, shapes.hidden, device=device, dtype=dtype, grad=False)
    buffer = torch.zeros(weight.shape, device=device)

    def run() -> None:
        embedding(input_ids, weight, backend="triton").backward(upstream)
        embedding(input_ids, weight, weight_grad=buffer, backend="triton").backward(upstream)

    return run


@case("swiglu")
def _swiglu(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    gate, up = (random(shapes.tokens, shapes.feed_forward, device=device, dtype=dtype) for _ in range(2))
    upstream = random(shapes.tokens, shapes.feed_forward, device=device, dtype=dtype, grad=False)
    return lambda: swiglu(gate, up, backend="triton").backward(upstream)


def _head(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = random(shapes.tokens, shapes.hidden, device=device, dtype=dtype)
    weight = random(shapes.vocabulary, shapes.hidden, device=device, dtype=dtype)
    return hidden, weight, torch.randint(shapes.vocabulary - 37, (shapes.tokens,), device=device)


@case("linear_cross_entropy")
def _linear_cross_entropy(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    hidden, weight, targets = _head(shapes, device, dtype)
    token_weights = torch.ones(shapes.tokens, device=device)
    options = {"token_weights": token_weights, "z_loss": 1e-4, "label_smoothing": 0.1}

    def run() -> None:
        for chosen in ({}, options):
            linear_cross_entropy(hidden, weight, targets, backend="triton", **chosen).loss_sum.backward()

    return run


@case("linear_cross_entropy_frozen_head")
def _linear_cross_entropy_frozen_head(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    hidden, weight, targets = _head(shapes, device, dtype)
    weight.requires_grad_(False)
    vocab_size = shapes.vocabulary - 37  # odd, as vocabularies are

    def run() -> None:
        linear_cross_entropy(hidden, weight, targets, vocab_size=vocab_size, backend="triton").loss_sum.backward()

    return run


@case("linear_cross_entropy_trained_rows")
def _linear_cross_entropy_trained_rows(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    hidden, weight, targets = _head(shapes, device, dtype)
    weight.requires_grad_(False)
    first_row = shapes.vocabulary * 2 // 3
    rows = row_range(weight, first_row, shapes.vocabulary - first_row)
    options = {"trained_rows": rows, "first_row": first_row, "backend": "triton"}

    def run() -> None:
        linear_cross_entropy(hidden, weight, targets, **options).loss_sum.backward()

    return run


@case("linear_cross_entropy_forward")
def _linear_cross_entropy_forward(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    hidden, weight, targets = _head(shapes, device, dtype)
    return torch.no_grad()(lambda: linear_cross_entropy(hidden, weight, targets, backend="triton").loss_sum)


@case("lora_mlp")
def _lora_mlp(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    def layer(inputs: int, outputs: int, rank: int) -> LoRAWeights:
        weight = random(outputs, inputs, device=device, dtype=dtype, grad=False)
        A, B = random(rank, inputs, device=device, dtype=dtype), random(outputs, rank, device=device, dtype=dtype)
        return LoRAWeights(weight, None, A, B)

    hidden, feed_forward = shapes.hidden, shapes.feed_forward
    h = random(shapes.tokens, hidden, device=device, dtype=dtype)
    norm_weight = random(hidden, device=device, dtype=dtype, grad=False)
    upstream = random(shapes.tokens, hidden, device=device, dtype=dtype, grad=False)
    seed = torch.cat([dropout_seed(device), dropout_seed(device)])
    layers = [
        (layer(hidden, feed_forward, rank), layer(hidden, feed_forward, rank), layer(feed_forward, hidden, rank))
        for rank in shapes.ranks
    ]
    options = {"norm_weight": norm_weight, "seed": seed, "backend": "triton"}

    def run() -> None:
        for dropout in (0.0, 0.05):
            for gate, up, down in layers:
                lora_mlp(h, gate, up, down, dropout=dropout, **options).backward(upstream)

    return run


def _decoder_layer(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Parameters of the shapes of one decoder layer."""
    hidden, kv, feed_forward = shapes.hidden, shapes.kv_heads * shapes.head_dim, shapes.feed_forward
    matrices = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    matrices += [(feed_forward, hidden), (feed_forward, hidden), (hidden, feed_forward)]
    return [random(*shape, device=device, dtype=dtype) for shape in [*matrices, (hidden,), (hidden,)]]


@case("adamw_8bit")
def _adamw_8bit(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    params = _decoder_layer(shapes, device, dtype)
    gradients = {param: random(*param.shape, device=device, dtype=torch.float32, grad=False) for param in params}
    optimizer = AdamW8bit(params, lr=1e-5, weight_decay=0.1, backend="triton")
    scale = torch.ones((), device=device)
    return lambda: optimizer.step(gradients=gradients, grad_scale=scale)


@case("adamw_8bit_without_masters")
def _adamw_8bit_without_masters(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    params = _decoder_layer(shapes, device, dtype)
    gradients = {param: torch.randn_like(param) for param in params}
    optimizer = AdamW8bit(params, lr=1e-5, weight_decay=0.1, masters="stochastic", backend="triton")
    return lambda: optimizer.step(gradients=gradients)


@case("low_rank_gemm")
def _low_rank_gemm(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    tokens, hidden, wide, rank = shapes.tokens, shapes.hidden, shapes.feed_forward, max(shapes.ranks)
    like = {"device": device, "dtype": dtype, "grad": False}
    x, grad_y, weight = random(tokens, hidden, **like), random(tokens, wide, **like), random(wide, hidden, **like)
    t, B, A = random(tokens, rank, **like), random(wide, rank, **like), random(rank, hidden, **like)
    seed = dropout_seed(device)

    def run() -> None:
        for config in CONFIGS:
            if config.least_capability <= compute_capability(x):
                options = {"config": config, "backend": "triton"}
                low_rank_gemm(x, weight.T, t, B.T, 0.5, **options)
                low_rank_gemm(grad_y, weight, t, A, seed=seed, dropout=0.05, **options)
                low_rank_gemm(grad_y, weight, addend=torch.empty_like(x), **options)

    return run


@case("fp8_linear")
def _fp8_linear(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    like = {"device": device, "dtype": dtype, "grad": False}
    hidden, kv, wide = shapes.hidden, shapes.kv_heads * shapes.head_dim, shapes.feed_forward
    x = random(shapes.tokens, hidden, **like)
    groups = [[random(outputs, hidden, **like) for outputs in sizes] for sizes in ((hidden, kv, kv), (wide, wide))]

    def run() -> None:
        quantise_rows([x], backend="triton")
        for group in groups:
            weights = [quantise_rows([weight], backend="triton") for weight in group]
            grads = [random(shapes.tokens, len(weight), **like) for weight in group]
            quantise_rows(grads, [weight.scales for weight in weights], backend="triton")
            triton_transposed([weight.codes for weight in weights])

    return run


@case("lora_linears")
def _lora_linears(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    like = {"device": device, "dtype": dtype}
    hidden, kv = shapes.hidden, shapes.kv_heads * shapes.head_dim

    def layer(outputs: int, rank: int) -> LoRAWeights:
        weight = random(outputs, hidden, **like, grad=False)
        return LoRAWeights(weight, None, random(rank, hidden, **like), random(outputs, rank, **like), 0.5)

    x = random(shapes.tokens, hidden, **like)
    norm_weight = random(hidden, **like, grad=False)
    groups = [[layer(outputs, rank) for outputs in (hidden, kv, kv)] for rank in shapes.ranks]
    upstream = [random(shapes.tokens, outputs, **like, grad=False) for outputs in (hidden, kv, kv)]
    seed = dropout_seed(device)

    def run() -> None:
        for dropout in (0.0, 0.05):
            for group in groups:
                options = {"dropout": dropout, "seed": seed, "backend": "triton"}
                torch.autograd.backward(lora_linears(x, group, norm_weight=norm_weight, **options), upstream)

    return run

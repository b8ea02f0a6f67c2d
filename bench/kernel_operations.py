"""The operations that bench/kernels.py compares: inputs, implementations with peers, formula, FLOPs and bytes.

Bytes count each input that has to be read and each output that has to be written once, in forward and in backward;
FLOPs count the matrix products that no implementation can leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from kernel_cases import Shapes
from torch import Tensor, nn

from redwhale.kernels.adamw_8bit_optimizer import AdamW8bit
from redwhale.kernels.embedding import embedding
from redwhale.kernels.linear_cross_entropy import linear_cross_entropy
from redwhale.kernels.lora_linear import LoRAWeights, lora_linears
from redwhale.kernels.lora_mlp import lora_mlp
from redwhale.kernels.rms_norm import add_rms_norm, rms_norm
from redwhale.kernels.rope import apply_rope, rope_cos_sin
from redwhale.kernels.row_range import row_range
from redwhale.kernels.swiglu import swiglu

Inputs = SimpleNamespace
Forward = Callable[[Inputs], tuple[Tensor, ...]]


@dataclass
class Operation:
    """One thing to compute, and who computes it."""

    name: str
    inputs: Inputs
    """Tensors by name; gradients are asked for those that require one."""
    exact: Forward
    """The formula, on inputs in float64."""
    flops: float
    bytes: float
    implementations: dict[str, Forward] = field(default_factory=dict)
    floors: dict[str, Forward] = field(default_factory=dict)
    """What is timed beside them but computes less, such as the frozen layer without its adapter."""
    compiled: dict[str, Forward] = field(default_factory=dict)
    """Plain formulas, timed as they are and through torch.compile."""
    calls: dict[str, Callable[[], object]] = field(default_factory=dict)
    """What is called as a whole, such as a step of an optimizer, and checked by its tests alone."""

    def add_own(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        """Both backends of this project's function of (inputs, backend)."""
        for backend in ("triton", "torch"):
            self.implementations[f"redwhale {backend}"] = lambda i, backend=backend: function(i, backend)


def peer(module: str, name: str) -> Callable | None:
    """A function of a package that may not be installed, or may not load on this machine."""
    try:
        return getattr(__import__(module, fromlist=[name]), name, None)
    except (ImportError, RuntimeError, OSError):
        return None


class Maker:
    """Draws tensors of one device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        drawn = torch.randn(shape, device=self.device, generator=self.generator) * scale
        return drawn.to(self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


def _cross_entropies(shapes: Shapes, make: Maker) -> Iterator[Operation]:
    tokens, hidden, vocabulary, size = shapes.tokens, shapes.hidden, shapes.vocabulary, make.itemsize

    def plain(i: Inputs) -> tuple[Tensor, ...]:
        return (F.cross_entropy(F.linear(i.hidden, i.weight).float(), i.targets, reduction="sum"),)

    def exact(i: Inputs) -> tuple[Tensor, ...]:
        return (F.cross_entropy(F.linear(i.hidden, i.weight), i.targets, reduction="sum"),)

    for name, head_trains, products in (
        ("linear_cross_entropy", True, 3),
        ("linear_cross_entropy, frozen head", False, 2),
    ):
        inputs = Inputs(
            hidden=make.normal(tokens, hidden, grad=True),
            weight=make.normal(vocabulary, hidden, scale=hidden**-0.5, grad=head_trains),
            targets=make.integers(vocabulary, tokens),
        )
        read_and_written = 2 * tokens * hidden * size + vocabulary * hidden * size * (2 if head_trains else 1)
        operation = Operation(name, inputs, exact, 2.0 * products * tokens * vocabulary * hidden, read_and_written)
        operation.add_own(lambda i, b: (linear_cross_entropy(i.hidden, i.weight, i.targets, backend=b).loss_sum,))
        operation.compiled["torch"] = plain
        if options := peer("torch.nn", "LinearCrossEntropyOptions"):
            operation.implementations["torch linear_cross_entropy"] = lambda i, options=options: (
                F.linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="sum", options=options()),
            )
        if liger := peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"):
            for label, chosen in (("liger", None), ("liger, fp32 sums", torch.float32)):
                operation.implementations[label] = lambda i, liger=liger, chosen=chosen: (
                    liger(i.hidden, i.weight, i.targets, reduction="sum", accum_dtype=chosen),
                )
        if cut := peer("cut_cross_entropy", "linear_cross_entropy"):
            for label, threshold in (("cut-cross-entropy", None), ("cut-cross-entropy, filtered", "high")):
                operation.implementations[label] = lambda i, cut=cut, threshold=threshold: (
                    cut(i.hidden, i.weight, i.targets, reduction="sum", filter_eps=threshold),
                )
        yield operation

    first = vocabulary // 2
    weight = make.normal(vocabulary, hidden, scale=hidden**-0.5)
    inputs = Inputs(
        hidden=make.normal(tokens, hidden, grad=True),
        weight=weight,
        rows=row_range(weight, first, vocabulary - first),
        targets=make.integers(vocabulary, tokens),
    )

    def exact_rows(i: Inputs) -> tuple[Tensor, ...]:
        return exact(Inputs(hidden=i.hidden, weight=torch.cat((i.weight[:first], i.rows)), targets=i.targets))

    flops = 4.0 * tokens * vocabulary * hidden + 2.0 * tokens * (vocabulary - first) * hidden
    read_and_written = 2 * tokens * hidden * size + (2 * vocabulary - first) * hidden * size
    operation = Operation("linear_cross_entropy, new rows", inputs, exact_rows, flops, read_and_written)
    operation.add_own(
        lambda i, b: (
            linear_cross_entropy(
                i.hidden, i.weight, i.targets, trained_rows=i.rows, first_row=first, backend=b
            ).loss_sum,
        )
    )
    yield operation


def _adapter(make: Maker, outputs: int, inputs: int, r: int) -> dict[str, Tensor]:
    return {
        "weight": make.normal(outputs, inputs, scale=inputs**-0.5),
        "A": make.normal(r, inputs, scale=inputs**-0.5, grad=True),
        "B": make.normal(outputs, r, scale=r**-0.5, grad=True),
    }


def _low_rank(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight) + F.linear(F.linear(x, a), b) * scale


def _peft_linear(inputs: int, outputs: int, r: int, scale: float) -> nn.Module | None:
    """peft's layer with its weights on `meta`: they are handed in with each call."""
    config, layer = peer("peft", "LoraConfig"), peer("peft.tuners.lora.layer", "Linear")
    if config is None or layer is None:
        return None
    base = nn.Linear(inputs, outputs, bias=False, device="meta")
    options = {"r": r, "lora_alpha": int(scale * r)}
    return layer(base, "default", config(**options, init_lora_weights=False), **options)


def _call_peft(layer: nn.Module, i: Inputs, number: int) -> Tensor:
    names = {"base_layer.weight": "weight", "lora_A.default.weight": "A", "lora_B.default.weight": "B"}
    weights = {name: getattr(i, f"{key}{number}") for name, key in names.items()}
    return torch.func.functional_call(layer, weights, (i.x,))


def _lora_linears(shapes: Shapes, make: Maker) -> Iterator[Operation]:
    tokens, hidden = shapes.tokens, shapes.hidden
    key_values = shapes.kv_heads * shapes.head_dim
    groups = [("lora_linear", (hidden,), r) for r in shapes.ranks]
    groups += [("lora_linears q, k, v", (hidden, key_values, key_values), r) for r in shapes.ranks]
    for name, outputs, r in groups:
        scale = 2.0
        inputs = Inputs(x=make.normal(tokens, hidden, grad=True))
        for number, width in enumerate(outputs):
            for key, value in _adapter(make, width, hidden, r).items():
                setattr(inputs, f"{key}{number}", value)
        parts = range(len(outputs))
        width = sum(outputs)
        base_flops, adapter_flops = 4.0 * tokens * hidden * width, 6.0 * tokens * r * (len(outputs) * hidden + width)
        size = make.itemsize
        moved = (2 * tokens * (hidden + width) + 2 * hidden * width + tokens * hidden) * size
        operation = Operation(
            f"{name}, r {r}",
            inputs,
            lambda i, parts=parts, scale=scale: tuple(
                _low_rank(i.x, *(getattr(i, f"{key}{n}") for key in ("weight", "A", "B")), scale) for n in parts
            ),
            base_flops + adapter_flops,
            moved,
        )

        def own(i: Inputs, backend: str, parts: range = parts, scale: float = scale) -> tuple[Tensor, ...]:
            layers = [
                LoRAWeights(getattr(i, f"weight{n}"), None, getattr(i, f"A{n}"), getattr(i, f"B{n}"), scale)
                for n in parts
            ]
            return lora_linears(i.x, layers, backend=backend)

        operation.add_own(own)
        operation.compiled["torch"] = operation.exact
        operation.floors["frozen layers alone"] = lambda i, parts=parts: tuple(
            F.linear(i.x, getattr(i, f"weight{n}")) for n in parts
        )
        layers = [layer for width in outputs if (layer := _peft_linear(hidden, width, r, scale))]
        if layers:
            operation.implementations["peft"] = lambda i, layers=layers: tuple(
                _call_peft(layer, i, n) for n, layer in enumerate(layers)
            )
        yield operation


def _lora_mlps(shapes: Shapes, make: Maker) -> Iterator[Operation]:
    tokens, hidden, wide = shapes.tokens, shapes.hidden, shapes.feed_forward

    def exact(i: Inputs) -> tuple[Tensor, ...]:
        x = i.x * torch.rsqrt(i.x.square().mean(-1, keepdim=True) + 1e-5) * i.norm
        gate, up = (_low_rank(x, i[f"weight_{n}"], i[f"A_{n}"], i[f"B_{n}"], 2.0) for n in ("gate", "up"))
        return (_low_rank(F.silu(gate) * up, i["weight_down"], i["A_down"], i["B_down"], 2.0),)

    for r in shapes.ranks:
        inputs = _Mapping(x=make.normal(tokens, hidden, grad=True), norm=make.normal(hidden))
        for name, (width, height) in {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}.items():
            for key, value in _adapter(make, width, height, r).items():
                setattr(inputs, f"{key}_{name}", value)
        flops = 12.0 * tokens * hidden * wide + 18.0 * tokens * r * (hidden + wide)
        moved = (5 * tokens * hidden + 4 * tokens * wide + 6 * hidden * wide) * make.itemsize
        operation = Operation(f"lora_mlp, r {r}", inputs, exact, flops, moved)

        def own(i: _Mapping, backend: str) -> tuple[Tensor, ...]:
            layers = [
                LoRAWeights(i[f"weight_{n}"], None, i[f"A_{n}"], i[f"B_{n}"], 2.0) for n in ("gate", "up", "down")
            ]
            return (lora_mlp(i.x, *layers, norm_weight=i.norm, backend=backend),)

        operation.add_own(own)
        operation.compiled["torch"] = exact
        operation.floors["frozen layers alone"] = lambda i: (
            F.linear(
                swiglu(F.linear(rms_norm(i.x, i.norm), i.weight_gate), F.linear(rms_norm(i.x, i.norm), i.weight_up)),
                i.weight_down,
            ),
        )
        yield operation


class _Mapping(SimpleNamespace):
    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)


def _memory_bound(shapes: Shapes, make: Maker) -> Iterator[Operation]:
    tokens, hidden, wide, size = shapes.tokens, shapes.hidden, shapes.feed_forward, make.itemsize
    inputs = Inputs(x=make.normal(tokens, hidden, grad=True), weight=make.normal(hidden, grad=True))

    def norm(i: Inputs) -> tuple[Tensor, ...]:
        x = i.x.double() if i.x.dtype == torch.float64 else i.x.float()
        return (i.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)).to(i.x.dtype),)

    operation = Operation("rms_norm", inputs, norm, 0.0, 5.0 * tokens * hidden * size)
    operation.add_own(lambda i, b: (rms_norm(i.x, i.weight, backend=b),))
    operation.implementations["torch rms_norm"] = lambda i: (F.rms_norm(i.x, (hidden,), i.weight, 1e-5),)
    operation.compiled["torch"] = norm
    if liger := peer("liger_kernel.transformers.functional", "liger_rms_norm"):
        operation.implementations["liger"] = lambda i: (liger(i.x, i.weight, 1e-5, in_place=False),)
    yield operation

    inputs = Inputs(
        x=make.normal(tokens, hidden, grad=True),
        residual=make.normal(tokens, hidden, grad=True),
        weight=make.normal(hidden, grad=True),
    )

    def add_norm(i: Inputs) -> tuple[Tensor, ...]:
        total = i.x + i.residual
        return (*norm(Inputs(x=total, weight=i.weight)), total)

    operation = Operation("add_rms_norm", inputs, add_norm, 0.0, 8.0 * tokens * hidden * size)
    operation.add_own(lambda i, b: add_rms_norm(i.x, i.residual, i.weight, backend=b))
    operation.compiled["torch"] = add_norm
    if liger := peer("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction"):
        operation.implementations["liger"] = lambda i, liger=liger: liger.apply(
            i.x, i.residual, i.weight, 1e-5, 0.0, "llama", False
        )
    yield operation

    inputs = Inputs(gate=make.normal(tokens, wide, grad=True), up=make.normal(tokens, wide, grad=True))
    operation = Operation("swiglu", inputs, lambda i: (F.silu(i.gate) * i.up,), 0.0, 8.0 * tokens * wide * size)
    operation.add_own(lambda i, b: (swiglu(i.gate, i.up, backend=b),))
    operation.compiled["torch"] = operation.exact
    if liger := peer("liger_kernel.transformers.functional", "liger_swiglu"):
        # Its backward pass overwrites gate and up; clones are not timed against it.
        operation.floors["liger, overwrites its inputs"] = lambda i, liger=liger: (liger(i.gate, i.up),)
    yield operation

    q = make.normal(tokens, shapes.heads, shapes.head_dim, grad=True)
    frequencies = 1e4 ** (-torch.arange(0, shapes.head_dim, 2, device=make.device) / shapes.head_dim)
    cos, sin = rope_cos_sin(torch.arange(tokens, device=make.device) % 4096, frequencies)
    inputs = Inputs(q=q, cos=cos, sin=sin)

    def rotate(i: Inputs) -> tuple[Tensor, ...]:
        first, second = i.q.float().chunk(2, -1) if i.q.dtype != torch.float64 else i.q.chunk(2, -1)
        c, s = i.cos[:, None], i.sin[:, None]
        return (torch.cat((first * c - second * s, second * c + first * s), -1).to(i.q.dtype),)

    moved = 4.0 * q.numel() * size + 4.0 * cos.numel() * 4
    operation = Operation("rope", inputs, rotate, 0.0, moved)
    operation.add_own(lambda i, b: (apply_rope(i.q, i.cos, i.sin, backend=b),))
    operation.compiled["torch"] = rotate
    yield operation

    # Both ways of training an embedding: the whole matrix, and its second half in a buffer of its own.
    weight = make.normal(shapes.vocabulary, hidden, grad=True)
    inputs = Inputs(weight=weight, ids=make.integers(shapes.vocabulary, tokens))
    moved = 3.0 * tokens * hidden * size + weight.numel() * size
    operation = Operation("embedding", inputs, lambda i: (F.embedding(i.ids, i.weight),), 0.0, moved)
    operation.add_own(lambda i, b: (embedding(i.ids, i.weight, backend=b),))
    operation.compiled["torch"] = operation.exact
    yield operation


def _optimizers(shapes: Shapes, make: Maker) -> Iterator[Operation]:
    """One step on the tensors of a decoder layer, bf16 weights and fp32 gradients."""
    hidden, keys = shapes.hidden, shapes.kv_heads * shapes.head_dim
    sizes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    sizes += [(shapes.feed_forward, hidden)] * 2 + [(hidden, shapes.feed_forward)] + [(hidden,)] * 2
    params = [make.normal(*size).bfloat16() for size in sizes]
    gradients = {param: torch.randn_like(param, dtype=torch.float32) for param in params}
    entries = sum(param.numel() for param in params)
    operation = Operation("adamw_8bit", Inputs(), lambda i: (), 0.0, 16.0 * entries)
    for backend in ("triton", "torch"):
        own = AdamW8bit([param.clone() for param in params], lr=1e-4, backend=backend)
        given = dict(zip(own.param_groups[0]["params"], gradients.values(), strict=True))
        operation.calls[f"redwhale {backend}"] = lambda own=own, given=given: own.step(gradients=given)

    def fp32_masters() -> list[Tensor]:
        masters = [param.float() for param in params]
        for master, gradient in zip(masters, gradients.values(), strict=True):
            master.grad = gradient
        return masters

    masters = fp32_masters()
    adamw = torch.optim.AdamW(masters, lr=1e-4, fused=True)

    def step_and_round() -> None:
        adamw.step()
        torch._foreach_copy_(params, masters)

    operation.calls["torch fused AdamW, fp32 masters"] = step_and_round
    if peer_class := peer("bitsandbytes.optim", "AdamW8bit"):
        theirs = peer_class(fp32_masters(), lr=1e-4)
        operation.calls["bitsandbytes AdamW8bit, fp32 weights"] = theirs.step
    yield operation


def operations(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Operation]:
    """All of them, one after the other, so that one's inputs are freed before the next one's are drawn."""
    make = Maker(device, dtype)
    yield from _cross_entropies(shapes, make)
    yield from _lora_linears(shapes, make)
    yield from _lora_mlps(shapes, make)
    yield from _memory_bound(shapes, make)
    yield from _optimizers(shapes, make)

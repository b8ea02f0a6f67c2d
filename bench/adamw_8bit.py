"""What 8 bits a moment cost AdamW: errors of the moments, of the steps and of the final loss, bytes, and time on a GPU.

- second_moment: error of sqrt(v) against exact averages of the same random gradients, whose scale falls to a tenth
  halfway: at the end of the first half, and at the end. `bias` and `spread` are mean and standard deviation of the
  logarithm of kept / exact.
- steps: a small language model trained by exact AdamW; beside it, averages kept in each code follow the same gradients.
  ‖step − exact step‖ / ‖exact step‖ with only that moment in 8 bits.
- losses: that model trained by each optimizer from the same weights on the same texts; held-out loss in nats a byte.

Codes are named after what is kept (m, r = sqrt(v), or v), its exponent bits and its mantissa bits. Rounding is to
nearest, by independent random numbers, or by the dither that the optimizer uses.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from common import PROJECT, parser, write_result
from torch import Tensor, nn

from redwhale.kernels import adamw_8bit
from redwhale.kernels.adamw_8bit_optimizer import AdamW8bit
from redwhale.kernels.minifloat import BLOCK, torch_decode, torch_dither, torch_encode, torch_random_words

Dither = Callable[[Tensor, int], Tensor]
CONTEXT, BATCH = 64, 16


def _nearest(words: Tensor, step: int) -> Tensor:
    return torch.full_like(words, 2**31)


def _independent(words: Tensor, step: int) -> Tensor:
    return torch.randint_like(words, 2**32)


ROUNDINGS: dict[str, Dither] = {"nearest": _nearest, "independent": _independent, "dither": torch_dither}
FIRST_CODES = {"m e2m5": (2, 5), "m e3m4": (3, 4), "m e4m3": (4, 3)}
SECOND_CODES = {"r e2m6": (2, 6), "r e3m5": (3, 5), "r e4m4": (4, 4), "v e4m4": (4, 4), "v e5m3": (5, 3)}


class Average:
    """An exponential moving average of [blocks, 256] entries, kept in codes between steps."""

    def __init__(self, name: str, decay: float, rounding: str, like: Tensor, number: int = 0) -> None:
        self.root = name.startswith("r")
        self.bits = {**FIRST_CODES, **SECOND_CODES}[name]
        self.decay, self.dither = decay, ROUNDINGS[rounding]
        self.words = torch_random_words(0, number, 0, like.numel(), 0, like.device).view_as(like)
        self.kept = torch.zeros_like(like)
        self.steps = 0

    def update(self, values: Tensor) -> Tensor:
        """The average of this step, before it is rounded; what is kept is that of `kept`."""
        average = self.decay * (self.kept.square() if self.root else self.kept) + (1 - self.decay) * values
        self.steps += 1
        stored = average.sqrt() if self.root else average
        self.kept = torch_decode(*torch_encode(stored, self.dither(self.words, self.steps), *self.bits), *self.bits)
        return average


def second_moment(code: str, rounding: str, beta2: float, spread: float, steps: int) -> dict[str, list[float]]:
    """Bias and spread of ln(kept / exact) of sqrt(v) after each half; `spread` is that of the logarithms of scales."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(spread * torch.randn(8, BLOCK, generator=generator)) * 1e-4
    exact, average = torch.zeros_like(scales), Average(code, beta2, rounding, scales)
    result: dict[str, list[float]] = {"bias": [], "spread": []}
    for step in range(1, steps + 1):
        gradient = scales * (0.1 if step > steps // 2 else 1.0) * torch.randn(scales.shape, generator=generator)
        exact = beta2 * exact + (1 - beta2) * gradient.square()
        average.update(gradient.square())
        if step in (steps // 2, steps):
            kept = average.kept if average.root else average.kept.sqrt()
            ratio = (kept / exact.sqrt()).log()
            result["bias"].append(round(ratio.mean().item(), 4))
            result["spread"].append(round(ratio.std().item(), 4))
    return result


class Block(nn.Module):
    """Attention and feed-forward of the small model."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.feed_forward_norm(x))))


class ByteModel(nn.Module):
    """A decoder over bytes with 135 thousand parameters."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, hidden: int = 64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm = nn.Embedding(256, hidden), nn.RMSNorm(hidden)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, hidden))
        self.blocks = nn.Sequential(Block(hidden), Block(hidden))
        self.head = nn.Linear(hidden, 256, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.to(dtype)

    def loss(self, texts: Tensor) -> Tensor:
        """Mean nats a byte of [B, CONTEXT + 1] bytes."""
        hidden = self.blocks(self.embed(texts[:, :-1]) + self.positions)
        return F.cross_entropy(self.head(self.norm(hidden)).float().flatten(0, 1), texts[:, 1:].flatten())


def texts() -> tuple[Tensor, Tensor]:
    """(training, held-out) windows of CONTEXT + 1 bytes of the quickstart's English and Korean texts."""
    folder = PROJECT / "quickstart-data"
    lines = [
        path.read_text(encoding="utf-8") for path in (folder / "english/train.jsonl", folder / "base/korean.jsonl")
    ]
    joined = "\n".join(json.loads(line)["text"] for line in "".join(lines).splitlines())
    windows = torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long().unfold(0, CONTEXT + 1, CONTEXT)
    held_out = torch.arange(len(windows)) % 20 == 0
    return windows[~held_out], windows[held_out]


def training(model: ByteModel, windows: Tensor, steps: int, seed: int, peak: float) -> Iterator[float]:
    """The learning rate of each step, after its backward pass and clipping; gradients are the model's."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        batch = windows[torch.randint(0, len(windows), (BATCH,), generator=generator)]
        model.zero_grad()
        model.loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield peak * min(1.0, step / 50) * (1 - 0.9 * step / steps)


def step_errors(beta2: float, steps: int) -> dict[str, dict[str, list[float]]]:
    """By code and rounding: mean over all steps, and mean of the last fifth."""
    model = ByteModel(0)
    params = [param for param in model.parameters() if param.numel() >= BLOCK]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, beta2), weight_decay=0.1)
    m = torch.zeros(sum(param.numel() for param in params)).view(-1, BLOCK)
    v = torch.zeros_like(m)
    pairs = [(code, rounding) for code in (*FIRST_CODES, *SECOND_CODES) for rounding in ROUNDINGS]
    averages = {
        (code, rounding): Average(code, 0.9 if code.startswith("m") else beta2, rounding, m, number)
        for number, (code, rounding) in enumerate(pairs)
    }
    errors: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for step, lr in enumerate(training(model, texts()[0], steps, 0, 2e-3), start=1):
        gradient = torch.cat([param.grad.flatten() for param in params if param.grad is not None]).view(-1, BLOCK)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, beta2 * v + (1 - beta2) * gradient.square()
        corrections = 1 / (1 - 0.9**step), (1 - beta2**step) ** -0.5

        def change(m: Tensor, v: Tensor, corrections: tuple[float, float] = corrections) -> Tensor:
            return m * corrections[0] / (v.sqrt() * corrections[1] + 1e-8)

        exact = change(m, v)
        for (code, rounding), average in averages.items():
            if code.startswith("m"):
                coded = change(average.update(gradient), v)
            else:
                coded = change(m, average.update(gradient.square()))
            errors[code, rounding].append(((coded - exact).norm() / exact.norm()).item())
    result: dict[str, dict[str, list[float]]] = {}
    for (code, rounding), values in errors.items():
        summary = [statistics.mean(values), statistics.mean(values[-steps // 5 :])]
        result.setdefault(code, {})[rounding] = [round(value, 4) for value in summary]
    return result


@contextmanager
def rounding_of_the_optimizer(rounding: str) -> Iterator[None]:
    """Let the PyTorch backend round like that meanwhile."""
    previous = adamw_8bit.torch_dither
    adamw_8bit.torch_dither = ROUNDINGS[rounding]
    try:
        yield
    finally:
        adamw_8bit.torch_dither = previous


def held_out_loss(name: str, seed: int, beta2: float, steps: int, peak: float) -> float:
    """Train by the optimizer of that name, as in `OPTIMIZERS`."""
    dtype, masters, rounding = OPTIMIZERS[name]
    train, held_out = texts()
    model = ByteModel(seed, dtype)
    options = {"lr": 0.0, "betas": (0.9, beta2), "weight_decay": 0.1}
    if rounding is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), **options)
    else:
        optimizer = AdamW8bit(model.parameters(), masters=masters or "split", seed=seed, backend="torch", **options)
    with rounding_of_the_optimizer(rounding or "dither"):
        for lr in training(model, train, steps, seed, peak):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    with torch.no_grad():
        return statistics.mean(model.loss(part).item() for part in held_out.split(64))


OPTIMIZERS = {
    "fp32 weights, fp32 moments": (torch.float32, None, None),
    "fp32 weights, 8-bit moments, dither": (torch.float32, "split", "dither"),
    "fp32 weights, 8-bit moments, independent": (torch.float32, "split", "independent"),
    "fp32 weights, 8-bit moments, nearest": (torch.float32, "split", "nearest"),
    "bf16 weights and moments": (torch.bfloat16, None, None),
    "bf16 weights, split masters, 8-bit moments, dither": (torch.bfloat16, "split", "dither"),
    "bf16 weights, no masters, 8-bit moments, dither": (torch.bfloat16, "stochastic", "dither"),
    "bf16 weights, no masters, 8-bit moments, independent": (torch.bfloat16, "stochastic", "independent"),
}
"""By name: dtype of the weights, masters, and the rounding of 8-bit codes; none for torch's AdamW."""


def state_bytes() -> dict[str, float]:
    """Bytes an entry that the optimizer keeps beside a bf16 weight, of a tensor of 2^20 entries."""
    kept = {}
    for masters in ("split", "stochastic"):
        weight = nn.Parameter(torch.zeros(2**20, dtype=torch.bfloat16))
        weight.grad = torch.zeros_like(weight)
        optimizer = AdamW8bit([weight], masters=masters)
        optimizer.step()
        state = optimizer.state[weight].values()
        kept[masters] = sum(value.nbytes for value in state if isinstance(value, Tensor)) / 2**20
    return kept


def gpu_times(device: torch.device, calls: int = 20) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step on a decoder layer of SOLAR-10.7B in bf16, and GB/s of the bytes it has to move."""
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14_336, 4096)] * 3 + [(4096,)] * 2
    entries = sum(torch.Size(shape).numel() for shape in shapes)
    found = {}
    for name, bytes_an_entry in (("split", 14), ("stochastic", 10), ("torch fused, bf16 moments", 14)):
        params = [nn.Parameter(torch.randn(shape, device=device, dtype=torch.bfloat16)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        if name in ("split", "stochastic"):
            optimizer: torch.optim.Optimizer = AdamW8bit(params, lr=1e-5, masters=name, backend="triton")  # type: ignore
        else:
            optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)
        times = []
        for _ in range(calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            optimizer.step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        median = statistics.median(times[3:])
        found[name] = {"ms": round(median, 3), "gb_per_s": round(bytes_an_entry * entries / median / 1e6, 1)}
    return found


def main() -> None:
    """Measure, print tables, write the result."""
    arguments = parser(__doc__, "adamw_8bit-cpu")
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.add_argument("--steps", type=int, default=300, help="of each training run (default: %(default)s)")
    arguments.add_argument("--seeds", type=int, default=3, help="training runs an optimizer (default: %(default)s)")
    arguments.add_argument("--beta2", type=float, default=0.99, help="of the training runs (default: %(default)s)")
    arguments.add_argument("--peak-lr", type=float, default=6e-3, help="of the training runs (default: %(default)s)")
    given = arguments.parse_args()

    moments = {}
    for beta2, steps in ((0.95, 400), (0.99, 1000), (0.999, 3000)):
        for rounding in ROUNDINGS:
            codes = SECOND_CODES if rounding == "dither" else {"r e3m5": SECOND_CODES["r e3m5"]}
            for code in codes:
                for spread in (0.5, 1.5):
                    row = second_moment(code, rounding, beta2, spread, steps)
                    moments[f"beta2 {beta2}, {code}, {rounding}, spread of scales {spread}"] = row
                    print(f"sqrt(v) {beta2:6} {code} {rounding:12} {spread}: bias {row['bias']} spread {row['spread']}")
    errors = {}
    for beta2 in (0.95, 0.999):
        errors[f"beta2 {beta2}"] = step_errors(beta2, given.steps)
        for code, by_rounding in errors[f"beta2 {beta2}"].items():
            print(f"step {beta2:6} {code} {by_rounding}")
    losses = {}
    for name in OPTIMIZERS:
        values = [held_out_loss(name, seed, given.beta2, given.steps, given.peak_lr) for seed in range(given.seeds)]
        losses[name] = {"mean": round(statistics.mean(values), 4), "seeds": [round(value, 4) for value in values]}
        print(f"loss {name:55} {losses[name]['mean']:.4f}  {losses[name]['seeds']}", flush=True)
    results = {
        "second_moment": moments,
        "steps": {"mean_and_mean_of_the_last_fifth": errors},
        "losses": {"beta2": given.beta2, "steps": given.steps, "peak_lr": given.peak_lr, "optimizers": losses},
        "state_bytes_an_entry": state_bytes(),
    }
    if torch.cuda.is_available():
        results["gpu"] = {"device": torch.cuda.get_device_name(), "step": gpu_times(torch.device("cuda"))}
    write_result(given.result, __file__, results)


if __name__ == "__main__":
    main()

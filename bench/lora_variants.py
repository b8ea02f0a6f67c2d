"""Ways to compute one frozen linear layer with a LoRA adapter, forward and backward, beside the frozen layer alone.

Every way takes x, A and B, which require gradients, and a frozen W to y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ, and an upstream
gradient to those of x, A and B. Errors are ‖value − exact‖ / ‖exact‖ against float64 and come first; then all are timed
in turn, round after round, so that a disturbance of the machine falls on all alike.

- base: x·Wᵀ and dY·W alone, which nothing can be faster than.
- library: `lora_linear` with products of the library, updates added by the products themselves.
- epilogue: `lora_linear` with Triton's product that has the update inside (only on a GPU).
- augmented: [W | scale·B] is one [O, I + r] matrix, and x has r columns behind it for x·Aᵀ, so that one product does
  base and update, and dY·[W | scale·B] gives the base's dX and U at once. x is given inside its wider block, for free.
- unfused: the formula, with plain autograd.
- peft: the layer of that library, where it is installed.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import QuietTimer, parser, write_result
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from redwhale.kernels.launch import compute_capability
from redwhale.kernels.lora_linear import LoRAWeights, lora_linear
from redwhale.kernels.low_rank_gemm import CONFIGS, gemm, low_rank_gemm

Layer = Callable[[Tensor], Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALE = 2.0


class Augmented(torch.autograd.Function):
    """One product forward, two backward (and two for A and B) on matrices that hold base and adapter side by side."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, x_and_t: Tensor, weight_and_B: Tensor) -> Tensor:
        inputs = x.shape[1]
        weight_and_B[:, inputs:] = SCALE * B  # each step trains B
        x_and_t[:, inputs:] = x @ A.T
        ctx.save_for_backward(A, x_and_t, weight_and_B)
        return x_and_t @ weight_and_B.T

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        A, x_and_t, weight_and_B = ctx.saved_tensors
        inputs = A.shape[1]
        both = grads[0] @ weight_and_B
        grad_x, u = both[:, :inputs], both[:, inputs:]
        grad_B = torch.addmm(both.new_zeros(1), grads[0].T, x_and_t[:, inputs:], beta=0, alpha=SCALE)
        return grad_x.addmm_(u, A), u.T @ x_and_t[:, :inputs], grad_B, None, None


class Case:
    """Tensors of one layer, and the ways to compute it as functions of x."""

    def __init__(self, tokens: int, inputs: int, outputs: int, rank: int, device: torch.device, dtype: torch.dtype):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)

        self.x_and_t = normal(tokens, inputs + rank)
        self.x = self.x_and_t[:, :inputs].detach().requires_grad_()
        self.contiguous_x = self.x.detach().contiguous().requires_grad_()
        self.weight = normal(outputs, inputs, scale=inputs**-0.5)
        self.A = normal(rank, inputs, scale=inputs**-0.5).requires_grad_()
        self.B = normal(outputs, rank, scale=rank**-0.5).requires_grad_()
        self.weight_and_B = torch.cat([self.weight, self.B.detach()], 1)
        self.upstream = normal(tokens, outputs)

    def library(self, x: Tensor) -> Tensor:
        return lora_linear(x, LoRAWeights(self.weight, None, self.A, self.B, SCALE), backend="torch")

    def epilogue(self, x: Tensor) -> Tensor:
        return lora_linear(x, LoRAWeights(self.weight, None, self.A, self.B, SCALE), backend="triton")

    def augmented(self, x: Tensor) -> Tensor:
        return Augmented.apply(x, self.A, self.B, self.x_and_t, self.weight_and_B)  # type: ignore[return-value]

    def unfused(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + ((x @ self.A.T) @ self.B.T) * SCALE

    def peft(self) -> Layer | None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            return None
        outputs, inputs = self.weight.shape
        with torch.device(self.weight.device):
            base = nn.Sequential(nn.Linear(inputs, outputs, bias=False, dtype=self.weight.dtype))
        base[0].weight = nn.Parameter(self.weight, requires_grad=False)
        rank = len(self.A)
        config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["0"])
        layer = get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(self.A), nn.Parameter(self.B)
        # The wrapped parameters are new leaves that share memory; gradients are asked for by these.
        self.peft_leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        return layer

    def ways(self) -> dict[str, Callable[[], list[Tensor]]]:
        """Each gives y, dX, dA and dB."""

        def step(layer: Layer, x: Tensor, leaves: list[Tensor]) -> list[Tensor]:
            y = layer(x)
            return [y.detach(), *torch.autograd.grad(y, [x, *leaves], self.upstream)]

        own = [self.A, self.B]
        ways = {"library": lambda: step(self.library, self.contiguous_x, own)}
        if self.x.is_cuda:
            ways["epilogue"] = lambda: step(self.epilogue, self.contiguous_x, own)
        ways["augmented"] = lambda: step(self.augmented, self.x, own)
        ways["unfused"] = lambda: step(self.unfused, self.contiguous_x, own)
        if (theirs := self.peft()) is not None:
            ways["peft"] = lambda: step(theirs, self.contiguous_x, self.peft_leaves)
        return ways

    @torch.no_grad()
    def base(self) -> list[Tensor]:
        return [self.contiguous_x @ self.weight.T, self.upstream @ self.weight]

    @torch.no_grad()
    def exact(self) -> list[Tensor]:
        """y, dX, dA, dB in float64."""
        x, W, A, B, grad = (v.double() for v in (self.x, self.weight, self.A, self.B, self.upstream))
        u = SCALE * (grad @ B)
        return [x @ W.T + SCALE * (x @ A.T) @ B.T, grad @ W + u @ A, u.T @ x, SCALE * grad.T @ (x @ A.T)]

    def products(self) -> dict[str, Callable[[], object]]:
        """Forward and input gradient alone, with the update inside: every configuration of the Triton kernel."""
        x, W = self.contiguous_x.detach(), self.weight
        t, B, u, A = x @ self.A.detach().T, self.B.detach(), self.upstream @ self.B.detach(), self.A.detach()
        found: dict[str, Callable[[], object]] = {
            "library forward": lambda: gemm(x, W.T, t, B.T, SCALE, triton_kernels=False),
            "library input gradient": lambda: gemm(self.upstream, W, u, A, triton_kernels=False),
        }
        for config in CONFIGS:
            if config.least_capability > compute_capability(x):
                continue
            name = "x".join(map(str, config[:3])) + f", {config.num_warps} warps, {config.num_stages} stages"
            options = {"config": config, "backend": "triton"}
            found[f"{name} forward"] = lambda o=options: low_rank_gemm(x, W.T, t, B.T, SCALE, **o)
            found[f"{name} input gradient"] = lambda o=options: low_rank_gemm(self.upstream, W, u, A, **o)
        return found


def errors_of(case: Case) -> dict[str, dict[str, float]]:
    """Of every way, for y, dX, dA and dB; exits when one computes something else."""
    exact, found = case.exact(), {}
    limit = 1e-5 if case.x.dtype == torch.float32 else 0.02
    for name, way in case.ways().items():
        errors = [float((a.double() - e).norm() / e.norm()) for a, e in zip(way(), exact, strict=True)]
        found[name] = dict(zip(("y", "grad_x", "grad_A", "grad_B"), errors, strict=True))
        if not all(error < limit for error in errors):
            raise SystemExit(f"{name} computes something else: {found[name]}")
    return found


def timed(calls: dict[str, Callable[[], object]], given: argparse.Namespace, timer: QuietTimer | None):
    """Seconds of each run of each call, in turn; on a GPU (no timer) by its own clock."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(given.warmup + given.runs):
        for name, call in calls.items():
            if number < given.warmup:
                call()
            elif timer is not None:
                seconds[name].append(timer.time(call)[0])
            else:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def rows_of_table(seconds: dict[str, list[float]], flops: float) -> list[dict[str, object]]:
    return [
        {
            "name": name,
            "median_ms": round(1e3 * statistics.median(values), 4),
            "tflops": round(flops / statistics.median(values) / 1e12, 3),
            "ms": [round(1e3 * value, 4) for value in values],
        }
        for name, values in seconds.items()
    ]


def main() -> None:
    """Check, time, print a table, write the result."""
    arguments = parser(__doc__, "lora_variants-DEVICE")
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--tokens", type=int, help="default: 8192 on a GPU, 1024 on a CPU")
    arguments.add_argument("--inputs", type=int, help="default: 4096, or 1024")
    arguments.add_argument("--outputs", type=int, help="default: 14336, or 3584")
    arguments.add_argument("--ranks", type=int, nargs="+", help="default: 16 64 128, or 16 64")
    arguments.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: bf16, on a CPU bf16 fp32")
    arguments.add_argument("--runs", type=int, default=15, help="timed runs of each (default: %(default)s)")
    arguments.add_argument("--warmup", type=int, default=3, help="default: %(default)s")
    arguments.add_argument("--patience", type=float, default=300, help="seconds to wait for a quiet machine")
    given = arguments.parse_args()
    device = torch.device(given.device)
    on_gpu = device.type == "cuda"
    tokens = given.tokens or (8192 if on_gpu else 1024)
    inputs, outputs = given.inputs or (4096 if on_gpu else 1024), given.outputs or (14_336 if on_gpu else 3584)
    timer = None if on_gpu else QuietTimer(given.patience)

    found = []
    for dtype in given.dtypes or (["bf16"] if on_gpu else ["bf16", "fp32"]):
        for rank in given.ranks or ([16, 64, 128] if on_gpu else [16, 64]):
            case = Case(tokens, inputs, outputs, rank, device, DTYPES[dtype])
            errors = errors_of(case)
            base = 4.0 * tokens * inputs * outputs
            adapter = 6.0 * tokens * rank * (inputs + outputs)
            seconds = timed({"base": case.base, **case.ways()}, given, timer)
            table = rows_of_table({"base": seconds.pop("base")}, base) + rows_of_table(seconds, base + adapter)
            floor = table[0]["median_ms"]
            assert isinstance(floor, float)
            print(f"{dtype}, rank {rank}: the adapter's own FLOPs are {adapter / base:.1%} of the base's")
            for row in table:
                row["times_base"] = round(row["median_ms"] / floor, 3)  # type: ignore[operator]
                row["relative_errors"] = errors.get(str(row["name"]))
                print(f"  {row['name']:>10} {row['median_ms']:9.3f} ms {row['times_base']:6.3f} x base")
            found.append({"dtype": dtype, "rank": rank, "adapter_flops_share": adapter / base, "ways": table})
            if on_gpu:
                products = rows_of_table(timed(case.products(), given, timer), base / 2 + adapter / 3)
                found[-1]["products"] = products
                for row in products:
                    print(f"  {row['name']:>48} {row['median_ms']:9.3f} ms {row['tflops']:7.1f} TFLOPS")
    described = {"gpu": torch.cuda.get_device_name(device)} if on_gpu else {"threads": torch.get_num_threads()}
    described |= {} if timer is None else timer.described()
    shapes = {"tokens": tokens, "inputs": inputs, "outputs": outputs, "scale": SCALE}
    write_result(given.result.replace("DEVICE", device.type), __file__, {**shapes, **described, "layers": found})


if __name__ == "__main__":
    main()

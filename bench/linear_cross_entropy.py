"""Linear cross-entropy on the CPU: the project's kernel, the same loop with fresh blocks, and plain PyTorch.

Each takes bf16 hidden states and LM head to the loss and both gradients. All are timed in turn, round after round,
so that a disturbance of the machine falls on all alike.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import QuietTimer, parser, write_result
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from redwhale.kernels import linear_cross_entropy

Step = Callable[[Tensor, Tensor, Tensor], float]
"""Loss of (hidden [N, H], weight [V, H], targets [N]) in nats, summed; leaves the gradients in `.grad`."""


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Autograd through all logits at once."""
    loss = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    loss.backward()
    return loss.item()


def kernel(chunk_tokens: int) -> Step:
    """The project's kernel."""

    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk_tokens).loss_sum
        loss.backward()
        return loss.item()

    return step


def fresh_blocks(chunk_tokens: int) -> Step:
    """The kernel's operations, with new memory for the blocks of every chunk."""

    @torch.no_grad()
    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
        token_losses = torch.empty(len(hidden), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64)
        hidden.grad = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32)
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            x, target = hidden[chunk], targets[chunk][:, None]
            log_p = torch.log_softmax(torch.mm(x, weight.T), -1, dtype=torch.float32)
            token_losses[chunk] = -log_p.gather(1, target).squeeze(1)
            correct += (log_p.argmax(-1) == target.squeeze(1)).sum()
            grad_logits = log_p.exp_()
            grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=hidden.grad[chunk])
            grad_weight += torch.mm(grad_logits.T, x)
        weight.grad = grad_weight.to(weight.dtype)
        return token_losses.sum().item()

    return step


def peak_allocated_mb(run: Callable[[], object]) -> float:
    """The most memory, in MB of 10^6 bytes, that PyTorch held during a run beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "linear_cross_entropy-cpu")
    arguments.add_argument("--tokens", type=int, default=2048, help="default: %(default)s")
    arguments.add_argument("--vocabulary", type=int, default=36_000, help="default: %(default)s")
    arguments.add_argument("--hidden-size", type=int, default=128, help="default: %(default)s")
    arguments.add_argument("--chunks", type=int, nargs="+", default=[64, 128, 256, 512, 2048], help="tokens a chunk")
    arguments.add_argument("--runs", type=int, default=9, help="timed runs of each (default: %(default)s)")
    arguments.add_argument("--warmup", type=int, default=2, help="default: %(default)s")
    arguments.add_argument("--patience", type=float, default=300, help="seconds to wait for a quiet machine")
    given = arguments.parse_args()

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(given.tokens, given.hidden_size, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(given.vocabulary, given.hidden_size, generator=generator).mul_(0.05).bfloat16()
    weight.requires_grad_()
    targets = torch.randint(given.vocabulary, (given.tokens,), generator=generator)

    steps: dict[tuple[str, int | None], Step] = {("plain", None): plain}
    for chunk in given.chunks:
        steps["kernel", chunk] = kernel(chunk)
        steps["fresh_blocks", chunk] = fresh_blocks(chunk)

    def run(step: Step) -> float:
        hidden.grad = weight.grad = None
        return step(hidden, weight, targets)

    losses, gradients, seconds = {}, {}, {key: [] for key in steps}
    for key, step in steps.items():
        losses[key] = run(step)
        assert hidden.grad is not None
        assert weight.grad is not None
        gradients[key] = (hidden.grad.float(), weight.grad.float())
    for key in steps:
        # bf16 keeps 8 bits; a step that computes something else is off by far more than 2%.
        for own, reference in zip(gradients[key], gradients["plain", None], strict=True):
            assert (own - reference).norm() < 0.02 * reference.norm(), f"{key}: other gradients than plain PyTorch"
        assert abs(losses[key] / losses["plain", None] - 1) < 1e-3, f"{key}: another loss than plain PyTorch"
    gradients.clear()
    memory = {}
    for key, step in steps.items():
        hidden.grad = weight.grad = None
        memory[key] = peak_allocated_mb(lambda step=step: run(step))
    timer = QuietTimer(given.patience)
    for number in range(given.warmup + given.runs):
        for key, step in steps.items():
            if number < given.warmup:
                run(step)
            else:
                seconds[key].append(timer.time(lambda step=step: run(step))[0])

    rows = [
        {
            "implementation": name,
            "chunk_tokens": chunk,
            "median_seconds": round(statistics.median(seconds[name, chunk]), 4),
            "seconds": [round(value, 4) for value in seconds[name, chunk]],
            "peak_allocated_mb": round(memory[name, chunk], 1),
            "loss_per_token": losses[name, chunk] / given.tokens,
        }
        for name, chunk in steps
    ]
    for row in rows:
        print(f"{row['implementation']:>12} {row['chunk_tokens'] or '-':>5} {row['median_seconds']:.3f} s", end="")
        print(f" {row['peak_allocated_mb']:8.1f} MB")
    write_result(
        given.result,
        __file__,
        {
            "tokens": given.tokens,
            "vocabulary": given.vocabulary,
            "hidden_size": given.hidden_size,
            "dtype": "bfloat16",
            "threads": torch.get_num_threads(),
            **timer.described(),
            "implementations": rows,
        },
    )


if __name__ == "__main__":
    main()

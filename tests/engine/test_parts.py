"""An optimizer that holds a part of each parameter does to it what one that holds the whole does, to the bit."""

import pytest
import torch
from torch import nn

from redwhale.engine import OptimizerConfig, StageOptimizer
from redwhale.engine.parts import Parts, Span

ROWS, WIDTH, STEPS = 37, 64, 5
NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight")
CONFIGS = {
    "adamw": OptimizerConfig(weight_decay=0.1),
    "split": OptimizerConfig(masters="split"),
    "stochastic": OptimizerConfig(masters="stochastic"),
    "8 bit": OptimizerConfig(optimizer="adamw_8bit", weight_decay=0.1),
    "8 bit, stochastic": OptimizerConfig(optimizer="adamw_8bit", masters="stochastic"),
}


class Rows(Parts):
    """Rows of every parameter, each in a parameter of its own; gradient norms are those of the whole."""

    def __init__(self, first: int, norms: dict[str, float]) -> None:
        self.first, self.whole_norms = first, norms

    def span(self, name, parameter):
        return Span(self.first * WIDTH, ROWS * WIDTH)

    def norms(self, names, norms):
        return torch.tensor([self.whole_norms[name] for name in names])


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(ROWS, WIDTH, generator=generator) for name in NAMES}


def start() -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.float32) for name, tensor in gradients(99).items()}


def train(config, dtype, rows: slice) -> tuple[dict[str, torch.Tensor], StageOptimizer]:
    norms = {}
    parameters = {name: nn.Parameter(tensor.to(dtype)[rows].clone()) for name, tensor in start().items()}
    whole = rows == slice(0, ROWS)
    parts = {} if whole else {"parts": Rows(rows.start, norms)}
    optimizer = StageOptimizer(parameters, config, lr=1e-2, seed=3, **parts)
    for step in range(STEPS):
        given = {name: gradient.to(dtype) for name, gradient in gradients(step).items()}
        norms.update({name: torch.linalg.vector_norm(g, dtype=torch.float32).item() for name, g in given.items()})
        optimizer.start_step(1, 1.0)
        sum((parameters[name] * given[name][rows]).sum() for name in NAMES).backward()
        optimizer.finish_step()
    return {name: parameter.detach() for name, parameter in parameters.items()}, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parts_together_are_the_whole_to_the_bit(config, dtype):
    whole, optimizer = train(config, dtype, slice(0, ROWS))
    # Of 64 entries, four rows are a block of 8-bit states; the last part is empty.
    parts = [train(config, dtype, slice(first, last)) for first, last in ((0, 16), (16, 32), (32, 37), (37, 37))]
    for name in NAMES:
        assert torch.equal(torch.cat([weights[name] for weights, _ in parts]), whole[name]), name
    states = [part.state_tensors() for _, part in parts]
    for key, tensor in optimizer.state_tensors().items():
        if key.startswith("step"):
            assert all(state[key] == tensor for state in states)
            continue
        assert torch.equal(torch.cat([state[key] for state in states]), tensor), key
        spans = [part.state_spans()[key] for _, part in parts[:3]]
        if tensor.numel():
            assert {span.total for span in spans} == {tensor.numel()}
            sizes = [state[key].numel() for state in states]
            assert [span.first for span in spans] == [0, sizes[0], sizes[0] + sizes[1]]


def test_a_part_inherits_its_entries_of_a_whole_state():
    config = CONFIGS["8 bit"]
    _, whole = train(config, torch.bfloat16, slice(0, ROWS))
    state = {key: tensor.clone() for key, tensor in whole.state_tensors().items()}
    weights, _ = train(config, torch.bfloat16, slice(16, 32))
    heir = StageOptimizer({name: nn.Parameter(w) for name, w in weights.items()}, config, lr=1.0, parts=Rows(16, {}))
    assert heir.inherit(state) == list(NAMES)
    for name in NAMES:
        codes = f"exp_avg_codes.{name}"
        assert torch.equal(heir.state_tensors()[codes], state[codes][16 * WIDTH : 32 * WIDTH])

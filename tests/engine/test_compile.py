"""`compile = true` makes its graphs in a stage's first steps, and none for other document lengths."""

import contextlib
import functools

import pytest
import torch
from tiny import tiny_model
from torch._dynamo.utils import counters

from redwhale.engine import LoopConfig, Stage
from redwhale.engine.batches import Batch
from redwhale.engine.losses import next_token_loss
from redwhale.engine.stages import BlockSchedule, LoRAConfig
from redwhale.engine.train_step import TrainStep
from redwhale.model import PackedDocuments
from redwhale.model.activations import compile_layers

LENGTHS = ([32], [5, 27], [1, 2, 3, 26], [31, 1], [16, 16], [8, 8, 8, 8])
STAGES = {
    "odd layers": Stage(name="odd", train=("layers.odd",), tokens=1, lr=1e-3),
    "adapters on fp8": Stage(
        name="lora", train=("lora",), tokens=1, lr=1e-3, frozen="fp8", lora=LoRAConfig(r=4, dropout=0.1)
    ),
    "blocks": Stage(
        name="blocks", train=("layers",), tokens=1, lr=1e-3, blocks=BlockSchedule(layers=2, steps=2, order="cyclic")
    ),
}


def losses(stage: Stage, steps: int, compile: bool, graphs: list[int] | None = None) -> list[float]:
    """Of steps with other documents each; `graphs` takes how many there were after each."""
    loop = LoopConfig(batch_size=2, micro_batch_size=1, compile=compile)
    step = TrainStep(tiny_model(), stage, loop, steps=steps, loss=next_token_loss, first_new_row=90)
    found = []
    for number in range(steps):
        batches = []
        for half in range(2):
            ids = torch.randint(0, 90, (32,), generator=torch.Generator().manual_seed(2 * number + half))
            documents = PackedDocuments.from_lengths(LENGTHS[(2 * number + half) % len(LENGTHS)])
            batches.append(Batch(ids, ids.roll(-1), documents, 32))
        step.take(number, batches, 64)
        found.append(step.drain().nats / 64)
        if graphs is not None:
            graphs.append(counters["stats"]["unique_graphs"])
    step.restore_frozen()
    return found


@pytest.mark.parametrize("name", STAGES)
def test_no_graph_is_made_behind_the_first_steps(name, monkeypatch):
    monkeypatch.setattr(
        "redwhale.engine.train_step.compile_layers", functools.partial(compile_layers, backend="aot_eager")
    )
    counters.clear()
    graphs: list[int] = []
    stage = STAGES[name]
    # Blocks that wake for the first time train in ways that layers did not train before.
    settled = 4 if stage.blocks else 1
    with contextlib.ExitStack() as stack:
        stack.callback(torch.compiler.reset)
        compiled = losses(stage, 5, True, graphs)
    assert graphs[0] > 0
    assert graphs[settled - 1 :] == [graphs[settled - 1]] * (6 - settled)
    # The one way out of the graphs is attention over documents, which is meant to stay outside.
    assert all("packed_attention" in reason for reason in counters["graph_break"])
    assert not counters["recompile_limit"]
    assert compiled == pytest.approx(losses(stage, 5, False), rel=1e-5)

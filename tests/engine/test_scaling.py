"""The scaling model against cases that were computed by hand, against the plan, and its table in the documentation."""

import json
from pathlib import Path

import msgspec
import pytest

from redwhale.engine import LoopConfig, Stage
from redwhale.engine.gpus import GPUS
from redwhale.engine.run_plan import GEMM_SHARE, plan_stage
from redwhale.engine.scaling import (
    FABRICS,
    LINK_SHARE,
    Fabric,
    StageWork,
    UnitWork,
    hiding_tokens,
    memory_bytes,
    stage_work,
    step_time,
)
from redwhale.model import parameter_count, preset

PROJECT = Path(__file__).resolve().parents[2]
# Nodes of two GPUs; every link takes a byte a second.
SLOW = Fabric("slow", 2, 1 / LINK_SHARE, 1 / LINK_SHARE, 0.0, 0.0)
WORK = StageWork(
    units=(
        UnitWork(weight_bytes=2, gradient_bytes=2, forward=3.0, backward=5.0),
        UnitWork(weight_bytes=4, gradient_bytes=0, forward=3.0, backward=5.0),
    ),
    update=4.0,
    tokens=1,
    state_bytes=100_000_000_000,
    working_bytes=7_000_000_000,
)


def test_a_ring_moves_its_bytes_less_one_part_over_the_narrowest_link_and_waits_at_every_hop():
    fabric = FABRICS["infiniband-400"]
    inside = 7 / 8 * 1e9 / (0.8 * 450e9) + 7 * fabric.inside_latency
    assert fabric.ring(1e9, 8) == pytest.approx(inside)
    through = 63 / 64 * 1e9 / (0.8 * 8 * 50e9) + 56 * fabric.inside_latency + 7 * fabric.between_latency
    assert fabric.ring(1e9, 64) == pytest.approx(through)
    assert fabric.ring(1e9, 1) == 0
    # Eight all-reduces at once, of an eighth of the bytes each, over an eighth of the node's way out each.
    between = 2 * 7 / 8 * (1e9 / 8) / (0.8 * 50e9) + 2 * 7 * fabric.between_latency
    assert fabric.ring_between(1e9, 64) == pytest.approx(between)
    assert fabric.ring_between(1e9, 8) == 0


def test_fsdp_on_two_gpus_by_hand():
    # Gather A 0-1; A 1-4, gather B 1-3; B 4-7; again B 7-9; B back 9-14, gather A 9-10; A back 14-19; reduce A 19-20.
    step = step_time(WORK, SLOW, 2, "fsdp", 1)
    assert (step.seconds, step.compute, step.exposed) == (20 + 2, 16 + 2, 4)
    assert (step.gathered_bytes, step.reduced_bytes) == (6, 1)


def test_a_unit_that_is_kept_is_gathered_once():
    kept = msgspec.structs.replace(WORK.units[0], kept=True)
    # A unit without weights of its own computes last in forward and first in backward, 2 s each.
    last = UnitWork(weight_bytes=0, gradient_bytes=0, forward=2.0, backward=2.0)
    work = msgspec.structs.replace(WORK, units=(kept, WORK.units[1], last))
    # A 0-1 gathered; A 1-4; B 4-7; last 7-9; last back 9-11, gather B 9-11; B back 11-16; A back 16-21; reduce 21-22.
    step = step_time(work, SLOW, 2, "fsdp", 1)
    assert (step.seconds, step.gathered_bytes) == (22 + 2, (2 + 2 * 4) / 2)


def test_fsdp_through_two_nodes_by_hand():
    # Rings of four: gather A 0-1.5; A 1.5-4.5, gather B 1.5-4.5; B 4.5-7.5; B 7.5-10.5; B back 10.5-15.5; A back -20.5.
    step = step_time(WORK, SLOW, 4, "fsdp", 1)
    assert step.seconds == 20.5 + 1.5 + 4 / 4
    assert step.gathered_bytes == 2 * 6 * 3 / 4


def test_hsdp_reduces_inside_of_the_node_and_then_between_nodes():
    # As FSDP on two GPUs, and 2 s of an all-reduce of each byte with the other node.
    step = step_time(WORK, SLOW, 4, "hsdp", 1)
    assert step.seconds == 20 + 2 + 4 / 2
    assert (step.gathered_bytes, step.reduced_bytes) == (6, 2 / 2 + 2 * 1 / 2 * 2 / 2)
    assert step_time(WORK, SLOW, 2, "hsdp", 1) == step_time(WORK, SLOW, 2, "fsdp", 1)


def test_replication_moves_gradients_alone():
    step = step_time(WORK, SLOW, 2, "replicated", 1)
    assert (step.seconds, step.gathered_bytes, step.reduced_bytes) == (16 + 2 + 4, 0, 2)


def test_gathers_come_with_every_micro_batch_and_reductions_once_or_with_each():
    once = step_time(WORK, SLOW, 2, "fsdp", 3, reduce_each=False)
    assert (once.seconds, once.gathered_bytes, once.reduced_bytes) == (19 + 19 + 20 + 2, 18, 1)
    each = step_time(WORK, SLOW, 2, "fsdp", 3)
    assert (each.seconds, each.gathered_bytes, each.reduced_bytes) == (20 + 20 + 20 + 2, 18, 3)


def test_replication_never_waits_for_a_reduction_to_compute_on():
    units = tuple(UnitWork(weight_bytes=1, gradient_bytes=10, forward=1.0, backward=1.0) for _ in range(5))
    work = msgspec.structs.replace(WORK, units=units, update=0.0)
    # The last unit's backward ends at 6; five all-reduces of 10 s follow each other.
    assert step_time(work, SLOW, 2, "replicated", 1).seconds == 6 + 5 * 10


def test_memory_is_the_shard_what_is_gathered_and_what_is_not_sharded():
    def with_reserve(peak: float) -> int:
        return int(peak * 1.03) + 1_000_000_000

    assert memory_bytes(WORK, 4, whole_gradients=False) == with_reserve(25e9 + 7e9 + 2 // 4 + 6 + 2)
    assert memory_bytes(WORK, 1, whole_gradients=True) == with_reserve(107e9 + 2)


def test_gpus_that_do_not_fill_their_nodes_are_refused():
    with pytest.raises(ValueError, match="3 GPUs do not fill nodes of 2"):
        step_time(WORK, SLOW, 3, "fsdp", 1)


@pytest.mark.parametrize("fabric", FABRICS.values(), ids=FABRICS)
@pytest.mark.parametrize("parameters", [10**8, 10**9])
def test_gathers_hide_from_the_tokens_on_that_the_rule_says(fabric, parameters):
    """Whatever the model's size; the first gather of each pass is never hidden."""
    fabric = msgspec.structs.replace(fabric, inside_latency=0.0, between_latency=0.0)
    gpu, gpus = GPUS["h100-80gb"], 64
    first = fabric.ring(2 * parameters, gpus)

    def exposed(tokens: float) -> float:
        seconds = 2 * parameters * tokens / (gpu.flops * GEMM_SHARE)
        unit = UnitWork(weight_bytes=2 * parameters, gradient_bytes=0, forward=seconds, backward=seconds)
        work = msgspec.structs.replace(WORK, units=(unit,) * 40, update=0.0)
        return step_time(work, fabric, gpus, "fsdp", 1).exposed

    enough = hiding_tokens(gpu, fabric, gpus)
    assert exposed(1.01 * enough) == pytest.approx(2 * first)
    assert exposed(0.5 * enough) == pytest.approx(2 * first + 2 * 39 * first / 2)


@pytest.fixture(scope="module")
def lora_work():
    config = preset("tiny-solar-10.7b")
    stage = Stage(name="lora", train=("lora",), tokens=1000, lr=1e-4)
    loop = LoopConfig(batch_size=8, micro_batch_size=2)
    options = {"sequence_length": 64}
    return config, stage, loop, options, stage_work(config, stage, loop, GPUS["h100-80gb"], **options)


def test_one_gpu_takes_the_plans_time(lora_work):
    config, stage, loop, options, work = lora_work
    plan = plan_stage(config, stage, loop, GPUS["h100-80gb"], **options)
    step = step_time(work, FABRICS["infiniband-400"], 1, "replicated", 4)
    assert step.seconds == pytest.approx(8 * 64 / plan.tokens_per_second, rel=1e-3)
    assert step.exposed == 0
    assert step.gathered_bytes == step.reduced_bytes == 0


def test_a_frozen_trunk_is_gathered_and_only_adapters_are_reduced(lora_work):
    config, *_, work = lora_work
    adapters = work.weight_bytes // 2 - parameter_count(config)
    assert adapters > 0
    assert work.gradient_bytes == 4 * adapters
    assert len(work.units) == config.num_hidden_layers + 2
    assert [unit.kept for unit in work.units] == [True] + [False] * (config.num_hidden_layers + 1)
    assert [unit.gradient_bytes for unit in (work.units[0], work.units[-1])] == [0, 0]
    assert work.units[0].weight_bytes > work.units[-1].weight_bytes == 0
    assert work.units[0].forward == 0 < work.units[-1].forward


def test_the_documents_tables_are_what_the_bench_wrote():
    result = json.loads((PROJECT / "bench" / "results" / "scaling.json").read_text(encoding="utf-8"))
    cells: dict[tuple[str, str, int, int], list[str]] = {}
    for step in result["steps"]:
        key = step["fabric"], step["stage"], step["gpus"], step["sequences"]
        shown = f"{step['seconds']:.2f} s" if step["fits"] else "too large"
        cells.setdefault(key, []).append(f"{shown}, {step['memory_bytes'] / 1e9:.0f} GB")
    lines = (PROJECT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    rows = [f"| {stage} | {gpus} | {size} | {' | '.join(row)} |" for (_, stage, gpus, size), row in cells.items()]
    assert [row for row in rows if row not in lines] == []
    for name, tokens in result["hiding_tokens"].items():
        assert f"| {name} | {' | '.join(f'{count:,}' for count in tokens.values())} |" in lines

"""The memory plan against what torch's own allocator reports, and its arithmetic against formulas."""

import json
from dataclasses import replace

import msgspec
import pytest
import torch
from tiny import TINY

from redwhale.engine import LoopConfig, Stage
from redwhale.engine.allocations import measured_peak
from redwhale.engine.cli import main
from redwhale.engine.errors import RecipeError
from redwhale.engine.flops import attention_pairs, training_flops
from redwhale.engine.gpus import GPUS, Gpu, find_gpu
from redwhale.engine.loop_config import loop_of
from redwhale.engine.losses import next_token_loss
from redwhale.engine.memory_plan import _batch, stage_memory
from redwhale.engine.plans import PLANS, plan_stages
from redwhale.engine.run_plan import fastest_fit, plan_stage, remedy
from redwhale.engine.train_step import TrainStep
from redwhale.model import Llama, parameter_count, preset

CONFIG = replace(TINY, vocab_size=2000, hidden_size=64, intermediate_size=160, num_hidden_layers=4)
LENGTH, NEW = 128, 1500


def train(stage: Stage, loop: LoopConfig, dtype: torch.dtype) -> None:
    """Two real steps."""
    loop = loop_of(stage, loop)
    sequences = loop.resolved_micro_batch_size
    micro_batches = min(2, loop.batch_size // sequences)
    step = TrainStep(Llama(CONFIG).to(dtype), stage, loop, steps=10, loss=next_token_loss, first_new_row=NEW)
    for number in range(2):
        batches = [_batch(sequences, LENGTH, "cpu") for _ in range(micro_batches)]
        for batch in batches:
            batch.input_ids.random_(0, CONFIG.vocab_size)
            batch.targets.random_(0, CONFIG.vocab_size)
        step.take(number, batches, micro_batches * sequences * LENGTH)
        del batches
    step.restore_frozen()


def stages(*plans: str) -> list[Stage]:
    return [stage for plan in plans for stage in plan_stages(plan, 10**6)]


CASES = [
    *((stage, policy, {}, 4) for stage in stages("redwhale") for policy in ("none", "recompute-cheap", "full")),
    *((stage, "none", {"optimizer": "adamw_8bit"}, 4) for stage in stages("redwhale")),
    *((stage, "recompute-cheap", {}, 4) for stage in stages("full", "lisa", "badam", "eeve", "sequential")),
    *((stage, "none", {"masters": "stochastic"}, 2) for stage in stages("full")),
    *((stage, "full", {"in_backward": True, "grad_clip": 0.0}, 4) for stage in stages("redwhale")[1:3]),
    *((stage, "recompute-cheap", {"frozen": "fp8"}, 4) for stage in stages("redwhale")),
    *((stage, "full", {"frozen": "fp8", "optimizer": "adamw_8bit"}, 2) for stage in stages("redwhale")[1:4:2]),
]


@pytest.mark.parametrize(
    ("stage", "policy", "changes", "sequences"),
    CASES,
    ids=[f"{stage.name}-{policy}-{'-'.join(map(str, changes.values()))}" for stage, policy, changes, _ in CASES],
)
def test_planned_memory_is_what_torch_allocates(stage, policy, changes, sequences):
    # Both dtypes in turn: every stage has cases of either.
    dtype = (torch.bfloat16, torch.float32)[sum(map(ord, stage.name + policy)) % 2]
    stage = msgspec.structs.replace(stage, **changes)
    loop = LoopConfig(batch_size=4, micro_batch_size=sequences, activations=policy)
    options = {"sequence_length": LENGTH, "dtype": dtype, "device": "cpu", "first_new_row": NEW}
    planned = stage_memory(CONFIG, stage, loop, **options).peak_bytes
    assert planned == pytest.approx(measured_peak(lambda: train(stage, loop, dtype)), rel=0.05)


def test_every_built_in_stage_is_among_the_cases():
    assert {stage.name for stage, *_ in CASES} == {stage["name"] for plan in PLANS.values() for stage in plan}


def planned(stage: Stage, policy: str = "none", sequences: int = 1, **changes):
    loop = LoopConfig(batch_size=8, micro_batch_size=sequences, activations=policy)  # type: ignore[arg-type]
    return plan_stage(
        CONFIG, msgspec.structs.replace(stage, **changes), loop, GPUS["h100-80gb"], sequence_length=LENGTH,
        first_new_row=NEW,
    )  # fmt: skip


def test_on_a_gpu_state_has_the_bytes_that_its_definition_gives():
    every = Stage(name="all", train=("all",), tokens=1000, lr=1e-4)
    count, adamw, eight = parameter_count(CONFIG), planned(every).peak, planned(every, optimizer="adamw_8bit").peak
    # The allocator's blocks of 512 bytes round every tensor up.
    near = lambda nbytes: pytest.approx(nbytes, rel=0.03)  # noqa: E731
    assert (adamw["weights"], adamw["masters"], adamw["moments"]) == (near(2 * count), near(4 * count), near(8 * count))
    assert (eight["weights"], eight["masters"]) == (near(2 * count), near(2 * count))
    assert near(2.1 * count) == eight["moments"]
    assert adamw["gradients"] == near(4 * count)


def test_fp8_takes_a_byte_for_each_frozen_weight_of_the_layers_and_six_for_each_output():
    with torch.device("meta"):
        layers = [m for name, m in Llama(CONFIG).named_modules() if name.endswith("_proj")]
    blocks = lambda nbytes: -(-nbytes // 512) * 512  # noqa: E731
    # A scale and a bias for each output.
    matrices = [(m.in_features * m.out_features, m.out_features) for m in layers]  # type: ignore[operator]
    embed_head, odd, _, lora = stages("redwhale")
    for stage, share in ((embed_head, 1.0), (odd, 0.5), (lora, 1.0)):
        stored, fp8 = planned(stage), planned(stage, frozen="fp8")
        saved = stored.peak["weights"] - fp8.peak["weights"]
        taken = sum(blocks(size) + blocks(4 * outputs) + blocks(2 * outputs) for size, outputs in matrices)
        assert saved == share * (sum(blocks(2 * size) for size, _ in matrices) - taken)
        assert (stored.host_bytes, fp8.host_bytes) == (0, 2 * share * sum(size for size, _ in matrices))
        assert fp8.model_flops_per_token == stored.model_flops_per_token
        assert fp8.hardware_flops_per_token == pytest.approx(stored.hardware_flops_per_token, rel=1e-9)


def test_the_originals_that_come_back_at_the_end_are_planned_with():
    """Where a step takes little beside weights and optimizer states, the end of the stage is when most is needed."""
    config = replace(CONFIG, hidden_size=512, intermediate_size=1024)
    stage = msgspec.structs.replace(stages("redwhale")[1], frozen="fp8")
    options = {"sequence_length": 8, "dtype": torch.bfloat16}
    memory = stage_memory(config, stage, LoopConfig(batch_size=1, micro_batch_size=1), **options)
    assert memory.peak_bytes >= 2 * parameter_count(config) + memory.peak["masters"] + memory.peak["moments"]


def test_frozen_products_run_at_the_rate_of_fp8_where_a_gpu_has_one():
    config = preset("solar-10.7b", vocab_size=49_152)
    config = replace(config, num_hidden_layers=2)
    loop = LoopConfig(batch_size=4, micro_batch_size=2)
    for stage in (stages("redwhale")[0], stages("redwhale")[3]):
        speeds = {}
        for frozen, rate in (("stored", 2.0), ("fp8", 2.0), ("fp8", 4.0)):
            gpu = msgspec.structs.replace(GPUS["h100-80gb"], fp8_flops=rate * 1e15)
            changed = msgspec.structs.replace(stage, frozen=frozen)
            speeds[frozen, rate] = plan_stage(config, changed, loop, gpu, sequence_length=4096).tokens_per_second
        assert speeds["stored", 2.0] < speeds["fp8", 2.0] < speeds["fp8", 4.0]
    with pytest.raises(RecipeError, match="needs FP8 tensor cores, and a100-80gb has none"):
        plan_stage(config, changed, loop, GPUS["a100-80gb"], sequence_length=4096)


def test_policies_that_keep_less_take_less_and_compute_more():
    odd = stages("redwhale")[1]
    plans = [planned(odd, policy, 4) for policy in ("none", "recompute-cheap", "full")]
    assert plans[0].bytes > plans[1].bytes > plans[2].bytes
    assert plans[0].hardware_flops_per_token == plans[1].hardware_flops_per_token < plans[2].hardware_flops_per_token
    assert plans[0].tokens_per_second > plans[1].tokens_per_second > plans[2].tokens_per_second


def test_activations_grow_by_the_sequence():
    sizes = [planned(stages("redwhale")[1], "full", sequences).peak["activations"] for sequences in (1, 2, 4)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.1)


@pytest.mark.parametrize("stage", stages("redwhale", "full"), ids=lambda stage: stage.name)
def test_products_that_are_seen_are_those_of_the_formula(stage):
    """Counted one operation after the other, against `training_flops`; attention's backward computes scores anew."""
    plan = planned(stage)
    with torch.device("meta"):
        model = Llama(CONFIG)
    step = TrainStep(model, stage, LoopConfig(), steps=1, loss=next_token_loss, first_new_row=NEW)
    formula = training_flops(CONFIG, {name: step.trained[name] for name in step.trained})
    pairs = attention_pairs([LENGTH])
    assert plan.model_flops_per_token == pytest.approx(formula.of(LENGTH, pairs) / LENGTH)
    scores_again = 2 * pairs * CONFIG.num_attention_heads * CONFIG.head_dim * CONFIG.num_hidden_layers / LENGTH
    assert plan.hardware_flops_per_token == pytest.approx(plan.model_flops_per_token + scores_again, rel=0.01)


def test_auto_takes_the_fastest_of_all_settings_that_fit():
    stage = stages("redwhale")[1]
    options = {"sequence_length": LENGTH, "first_new_row": NEW}
    everything = [planned(stage, p, n) for p in ("none", "recompute-cheap", "full") for n in (1, 2, 4, 8)]
    limit = sorted(plan.bytes for plan in everything)[6]
    gpu = Gpu("between", limit, GPUS["h100-80gb"].flops, GPUS["h100-80gb"].bandwidth)
    loop = LoopConfig(batch_size=8, micro_batch_size="auto", activations="auto")
    found = fastest_fit(CONFIG, stage, loop, gpu, **options)
    assert found is not None
    assert found.bytes <= limit
    fastest = max(plan.tokens_per_second for plan in everything if plan.bytes <= limit)
    assert found.tokens_per_second >= 0.98 * fastest


def test_what_does_not_fit_says_what_would():
    every = Stage(name="all", train=("all",), tokens=1000, lr=1e-4)
    needs = [planned(every, "full"), planned(every, "full", optimizer="adamw_8bit")]
    gpu = Gpu("small", (needs[0].bytes + needs[1].bytes) // 2, 1e14, 1e12)
    loop = LoopConfig(batch_size=8, micro_batch_size=8, activations="none")
    options = {"sequence_length": LENGTH}
    assert (
        fastest_fit(
            CONFIG, every, LoopConfig(batch_size=8, micro_batch_size="auto", activations="auto"), gpu, **options
        )
        is None
    )
    text = remedy(CONFIG, every, loop, gpu, **options)
    assert text.startswith('fits with micro_batch_size = 1, activations = "full", optimizer = "adamw_8bit": 1.0 GB')
    nothing = remedy(CONFIG, every, loop, Gpu("none", 10**6, 1e14, 1e12), **options)
    assert nothing.startswith("does not fit even with ")
    assert nothing.endswith("train fewer layers at a time")


def test_solar_fits_80_gb_in_every_stage_of_the_recipe():
    config = preset("solar-10.7b", vocab_size=52_000)
    for stage in stages("redwhale"):
        layers = stage.train[0].startswith("layers")
        stage = msgspec.structs.replace(stage, optimizer="adamw_8bit" if layers else "adamw")
        loop = LoopConfig(batch_size=128, micro_batch_size=1, activations="full")
        plan = plan_stage(config, stage, loop, GPUS["h100-80gb"], sequence_length=4096)
        assert plan.fits, (stage.name, plan.bytes)
        assert plan.peak["weights"] == pytest.approx(2 * 10.895e9, rel=0.06)  # the adapters among them


def test_gpus_are_named_or_described():
    assert find_gpu("h200").bytes == 141 * 10**9
    assert find_gpu("mine=48GB,180,900") == Gpu("mine", 48 * 10**9, 180e12, 900e9)
    assert find_gpu("mine=48GB,180,900,360").fp8_flops == 360e12
    assert GPUS["a100-80gb"].fp8_flops is None
    for text in ("h100", "=48GB,180,900", "mine=48GB,180", "mine=0,1,1", "mine=..,1,1", "mine=48GB,180,900,0"):
        with pytest.raises(RecipeError, match="is not known; known are h100-80gb, h200"):
            find_gpu(text)


RECIPE = """
[base]
checkpoint = "nowhere"
[tokenizer]
max_added = 100
[init]
[train]
plan = "redwhale"
tokens = 1_000_000
sequence_length = 128
batch_size = 2
micro_batch_size = "auto"
activations = "auto"
"""


def test_the_command_prints_every_stage_and_writes_json(tmp_path, capsys):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    arguments = ["plan", str(path), "--gpu", "tiny=2GB,100,500", "--price", "2", "--json", str(tmp_path / "plan.json")]
    assert main([*arguments, "--model", "tiny-solar-10.7b"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ["embed+head", "odd-layers", "even-layers", "lora"]
    assert out.splitlines()[2].count("fits") == 1
    rows = json.loads((tmp_path / "plan.json").read_text())["stages"]
    assert [row["fits"] for row in rows] == [True] * 4
    assert main(arguments) == 2
    assert "there is no checkpoint 'nowhere' yet: name its shape with --model" in capsys.readouterr().err
    assert main(["plan", str(path), "--gpu", "h100"]) == 2
    assert "gpu 'h100' is not known" in capsys.readouterr().err


def test_the_command_knows_which_gpus_multiply_fp8(tmp_path, capsys):
    path = tmp_path / "r.toml"
    stage = '[[train.stages]]\nname = "top"\ntrain = ["head"]\ntokens = 1000\nlr = 1e-3\nfrozen = "fp8"\n'
    path.write_text(RECIPE.replace('plan = "redwhale"\ntokens = 1_000_000\n', "") + stage)
    arguments = ["plan", str(path), "--model", "tiny-solar-10.7b", "train.activations=none", "--gpu"]
    assert main([*arguments, "tiny=2GB,100,500,200"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].split()[4] == "fp8"
    assert "top keeps 0.0 GB of frozen weights in the host's memory" in out
    assert main([*arguments, "tiny=2GB,100,500"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].split()[4] == "stored"
    assert 'top would end with an error: frozen = "fp8" needs FP8 tensor cores, and tiny has none' in out

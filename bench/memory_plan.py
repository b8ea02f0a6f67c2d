"""The memory plan against torch's CPU allocator, and what it says of SOLAR-10.7B on GPUs.

First, small models train two real steps in every stage of every built-in plan, over policies, optimizers and dtypes.
The plan is held against the most that the allocator had handed out. Then the stages of a recipe are planned for GPUs.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from common import PROJECT, parser, write_result

from redwhale.engine import LoopConfig, Stage
from redwhale.engine.allocations import measured_peak
from redwhale.engine.batches import Batch
from redwhale.engine.gpus import GPUS
from redwhale.engine.loop_config import Frozen, loop_of
from redwhale.engine.losses import next_token_loss
from redwhale.engine.memory_plan import stage_memory
from redwhale.engine.plans import PLANS, plan_stages
from redwhale.engine.recipe import load_recipe
from redwhale.engine.run_plan import BANDWIDTH_SHARE, FP8_SHARE, GEMM_SHARE, fastest_fit, plan_stage
from redwhale.engine.train_step import TrainStep
from redwhale.model import Llama, PackedDocuments, preset

SMALL = replace(preset("tiny-solar-10.7b", vocab_size=4096), num_hidden_layers=4)
LENGTH, SEQUENCES, NEW = 256, 2, 3000


def train(stage: Stage, loop: LoopConfig, dtype: torch.dtype) -> None:
    """Two steps of two micro-batches."""
    loop = loop_of(stage, loop)
    step = TrainStep(Llama(SMALL).to(dtype), stage, loop, steps=10, loss=next_token_loss, first_new_row=NEW)
    for number in range(2):
        micro_batches = []
        for _ in range(2):
            ids = torch.randint(0, SMALL.vocab_size, (SEQUENCES * LENGTH,))
            documents = PackedDocuments.from_lengths([LENGTH] * SEQUENCES)
            micro_batches.append(Batch(ids, ids.clone(), documents, len(ids)))
        step.take(number, micro_batches, 2 * SEQUENCES * LENGTH)
        del micro_batches
    step.restore_frozen()


def main() -> None:
    """Compare, plan and write the result."""
    arguments = parser(__doc__, "memory_plan")
    arguments.add_argument("--recipe", type=Path, default=PROJECT / "recipes" / "solar-10.7b.toml")
    arguments.add_argument("--model", default="solar-10.7b", help="preset (default: %(default)s)")
    arguments.add_argument("--gpus", nargs="+", default=["h100-80gb"], choices=tuple(GPUS))
    given = arguments.parse_args()
    torch.set_num_threads(1)
    compared: list[dict[str, Any]] = []
    for name in PLANS:
        optimizers = ("adamw", "adamw_8bit") if name in ("redwhale", "full") else ("adamw",)
        policies = ("none", "recompute-cheap", "full") if name == "redwhale" else ("recompute-cheap",)
        frozen_ways: tuple[Frozen, ...] = ("stored", "fp8") if name == "redwhale" else ("stored",)
        for stage, optimizer, policy, frozen in itertools.product(
            plan_stages(name, 10**6), optimizers, policies, frozen_ways
        ):
            dtype = torch.bfloat16 if len(compared) % 3 else torch.float32
            stage = msgspec.structs.replace(stage, optimizer=optimizer, frozen=frozen)
            loop = LoopConfig(batch_size=2 * SEQUENCES, micro_batch_size=SEQUENCES, activations=policy)
            options = {"sequence_length": LENGTH, "dtype": dtype, "device": "cpu", "first_new_row": NEW}
            planned = stage_memory(SMALL, stage, loop, **options).peak_bytes
            measured = measured_peak(lambda s=stage, lo=loop, d=dtype: train(s, lo, d))
            case = {
                "plan": name,
                "stage": stage.name,
                "optimizer": optimizer,
                "activations": policy,
                "frozen": frozen,
                "dtype": str(dtype),
            }
            compared.append(
                {**case, "planned": planned, "measured": measured, "error": round(planned / measured - 1, 5)}
            )
    errors = [abs(row["error"]) for row in compared]
    print(f"{len(errors)} cases, largest error {max(errors):.2%}, mean {sum(errors) / len(errors):.3%}")

    recipe = load_recipe(given.recipe)
    assert recipe.train is not None
    assert recipe.tokenizer is not None
    base = preset(given.model)
    config = replace(base, vocab_size=base.vocab_size + recipe.tokenizer.max_added)
    plans: dict[str, list[dict[str, Any]]] = {}
    for gpu in given.gpus:
        for stage in recipe.train.all_stages:
            options = {"sequence_length": recipe.train.sequence_length, "first_new_row": base.vocab_size}
            plan = plan_stage(config, stage, recipe.train, GPUS[gpu], **options)
            free = msgspec.structs.replace(recipe.train, micro_batch_size="auto", activations="auto")
            best = fastest_fit(config, stage, free, GPUS[gpu], **options)
            ways = {"recipe": plan, "fastest": best}
            if GPUS[gpu].fp8_flops is not None:
                in_fp8 = msgspec.structs.replace(free, frozen="fp8")
                ways["fastest_fp8"] = fastest_fit(config, stage, in_fp8, GPUS[gpu], **options)
            plans.setdefault(gpu, []).append(
                {
                    kind: {**msgspec.to_builtins(p), "bytes": p.bytes, "hours": round(p.hours, 1)} if p else None
                    for kind, p in ways.items()
                }
            )
            speeds = {kind: f"{p.tokens_per_second:,.0f} tokens/s" for kind, p in ways.items() if p}
            print(gpu, stage.name, f"{plan.bytes / 1e9:.1f} GB", speeds)
    write_result(
        given.result,
        __file__,
        {
            "compared": compared,
            "largest_error": max(errors),
            "shares_assumed": {"products": GEMM_SHARE, "fp8_products": FP8_SHARE, "bandwidth": BANDWIDTH_SHARE},
            "plans": plans,
        },
    )


if __name__ == "__main__":
    main()

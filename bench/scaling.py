"""Simulated time of a training step on 8, 64 and 512 GPUs, by the model of engine/scaling.py; nothing is measured.

Stages of a recipe, and training of everything at once, on two kinds of links and by three ways to spread the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from common import PROJECT, parser, write_result

from redwhale.engine import Stage, load_recipe
from redwhale.engine.gpus import find_gpu
from redwhale.engine.plan_command import planned_model
from redwhale.engine.scaling import FABRICS, LINK_SHARE, Strategy, hiding_tokens, stage_work, step_time

GPUS = (8, 64, 512)
STRATEGIES: tuple[Strategy, ...] = ("replicated", "fsdp", "hsdp")
EVERYTHING = Stage(name="everything", train=("all",), tokens=1, lr=1e-5, activations="full")


def main() -> None:
    arguments = parser(__doc__, "scaling")
    arguments.add_argument("recipe", nargs="?", type=Path, default=PROJECT / "recipes" / "solar-10.7b.toml")
    arguments.add_argument("--model", default="solar-10.7b", help="preset or checkpoint (default: %(default)s)")
    arguments.add_argument("--gpu", default="h100-80gb", help="as for `redwhale plan` (default: %(default)s)")
    given = arguments.parse_args()
    recipe, gpu = load_recipe(given.recipe), find_gpu(given.gpu)
    train = recipe.train
    assert train is not None
    base, config = planned_model(recipe, given.model)
    steps: list[dict[str, Any]] = []
    for stage in (*train.all_stages, EVERYTHING):
        work = stage_work(
            config, stage, train, gpu, sequence_length=train.sequence_length, first_new_row=base.vocab_size
        )
        sequences = work.tokens // train.sequence_length
        for fabric in FABRICS.values():
            for gpus in GPUS:
                micro_batches = max(1, train.batch_size // (gpus * sequences))
                for strategy in STRATEGIES:
                    found = step_time(work, fabric, gpus, strategy, micro_batches)
                    described = {name: round(value, 4) for name, value in msgspec.structs.asdict(found).items()}
                    steps.append(
                        {
                            **{"stage": stage.name, "fabric": fabric.name, "gpus": gpus, "strategy": strategy},
                            "sequences": micro_batches * sequences * gpus,
                            "fits": found.memory_bytes <= gpu.bytes,
                            **described,
                        }
                    )
        print(stage.name, flush=True)
    hiding = {
        name: {str(gpus): round(hiding_tokens(gpu, fabric, gpus)) for gpus in GPUS} for name, fabric in FABRICS.items()
    }
    write_result(
        given.result,
        __file__,
        {
            "gpu": msgspec.to_builtins(gpu),
            "fabrics": msgspec.to_builtins(list(FABRICS.values())),
            "link_share": LINK_SHARE,
            "sequence_length": train.sequence_length,
            "hiding_tokens": hiding,
            "steps": steps,
        },
        data=[given.recipe],
    )


if __name__ == "__main__":
    main()

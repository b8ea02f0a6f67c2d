"""Trains stages in one process and in several that share the model, and leaves what they end with.

Run as a program: `distributed_worker.py FOLDER PROCESSES NAME...`, NAME being of CASES. Every process is a fork of this
one, which has imported everything and run nothing. Leaves `FOLDER/NAME/PROCESSES/model`, `metrics.jsonl` and the rest
that a stage leaves.
"""

import gc
import json
import os
import socket
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from tiny import TINY, tiny_model

from redwhale.engine import (
    BlockSchedule,
    LoopConfig,
    LoRAConfig,
    PackedSequences,
    Stage,
    TokenShards,
    Trainer,
    ValidationSet,
    write_shard,
)
from redwhale.engine.plans import PLANS
from redwhale.engine.world import World, join

LENGTH, BATCH, STEPS, FIRST_NEW = 16, 8, 20, 80


@dataclass
class Case:
    """One stage, and how it trains."""

    stage: Stage
    loop: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    tied: bool = False


def stage(*train: str, **options: Any) -> Stage:
    defaults = {"lr": 1e-2, "weight_decay": 0.1, "lora": LoRAConfig(r=4, alpha=8.0)}
    return Stage(name="s", train=train, tokens=STEPS * BATCH * LENGTH, **{**defaults, **options})


BLOCKS = BlockSchedule(layers=1, steps=3)
TRAIN = [
    *(("embed", "head"), ("layers.odd",), ("layers.even",), ("lora",), ("norms",), ("embed", "lora")),
    *(("embed.new", "head.new", "lora"), ("layers[1:3]", "head.new")),
    *(stage["train"] for plan in PLANS.values() for stage in plan),
]
"""What stages train: every kind of selector, and those of every plan."""
EQUAL = {"+".join(train): Case(stage(*train)) for train in TRAIN} | {
    "blocks": Case(stage("head", "layers", blocks=BLOCKS)),
    "tied": Case(stage("all"), tied=True),
    "tied new rows": Case(stage("embed.new"), tied=True),
    "one micro-batch": Case(stage("all"), {"micro_batch_size": 8}),
    "in backward, one micro-batch": Case(stage("all", in_backward=True), {"micro_batch_size": 8}),
    "in backward, no clipping": Case(stage("embed.new", "layers", in_backward=True, grad_clip=0.0)),
    "recomputed": Case(stage("all"), {"activations": "full", "z_loss": 1e-2}),
    "best": Case(stage("all", lr=0.3), {"validate_every": 4, "keep_best": True}),
}
"""fp32: as good as equal to one process."""
CLOSE = {
    "8 bit": Case(stage("all", optimizer="adamw_8bit")),
    "8 bit, bf16": Case(stage("embed.new", "layers", optimizer="adamw_8bit"), dtype=torch.bfloat16),
    "bf16": Case(stage("all"), dtype=torch.bfloat16),
    "bf16, stochastic": Case(stage("layers", masters="stochastic"), dtype=torch.bfloat16),
    "bf16, new rows": Case(stage("embed.new", "head.new"), dtype=torch.bfloat16),
}
"""Where sums in another order are rounded to something else, now and then."""
CASES = EQUAL | CLOSE


def write_data(folder: Path) -> None:
    """Counting in steps of 1 to 3, so that there is something to learn; documents of very different lengths."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    documents = []
    for length in rng.integers(2, 60, 120):
        start, stride = int(rng.integers(0, 94)), int(rng.integers(1, 4))
        documents.append([3 + (start + stride * i) % 94 for i in range(length)])
    for split, chosen in {"t": documents, "held": documents[:5]}.items():
        items = ((document, len(document)) for document in chosen)
        write_shard(folder / f"{split}-0", items, vocab_size=TINY.vocab_size, tokenizer_sha256="x")


def model_of(case: Case):
    config = replace(TINY, tie_word_embeddings=case.tied)
    return tiny_model(case.dtype, config=config)


def trainer_of(case: Case, folder: Path, data: Path, world: World, **options: Any) -> Trainer:
    train, held_out = (PackedSequences(TokenShards.open(data, split), LENGTH) for split in ("t", "held"))
    loop = {"batch_size": BATCH, "micro_batch_size": 2, "log_every": 1, "checkpoint_every": 100, **case.loop}
    return Trainer(
        model_of(case),
        case.stage,
        train,
        sequence_length=LENGTH,
        folder=folder,
        loop=LoopConfig(**loop),
        first_new_row=FIRST_NEW,
        validation={"counting": ValidationSet(held_out, 1000)},
        world=world,
        **options,
    )


def run(root: Path, processes: int, names: list[str]) -> None:
    """Train the cases in this process, one of `processes`."""
    world = join()
    world.start(torch.device("cpu"))
    for name in names:
        folder = root / name / str(processes)
        trainer = trainer_of(CASES[name], folder, root / "data", world)
        result = trainer.run()
        trainer.save_model(folder / "model")
        if world.is_first:
            (folder / "result.json").write_bytes(msgspec.json.encode(result))
    world.close()


def fork(processes: int, work) -> list[int]:
    """Fork processes that find each other as those of torchrun do, and wait; their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        status = 1
        try:
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="localhost")
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()
    root, processes, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(CASES)
    codes = fork(processes, lambda: run(root, processes, names))
    sys.exit(max(abs(code) for code in codes))

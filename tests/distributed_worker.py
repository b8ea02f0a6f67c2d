"""Trains stages in one process and in several that share the model, and leaves what they end with.

Run as a program: `distributed_worker.py FOLDER PLAN`, where PLAN is JSON: a list of [PROCESSES, ACTION, NAMES...], done
one after the other, with an ACTION of ACTIONS and NAMES of CASES. Every process is a fork of this one, which has
imported everything and run nothing. What a case leaves is in `FOLDER/NAME/PROCESSES`, or in `FOLDER/NAME/resumed` where
runs with several numbers of processes go on from each other.
"""

import contextlib
import gc
import io
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file
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
from redwhale.engine.cli import main
from redwhale.engine.errors import Interrupted, RecipeError
from redwhale.engine.plans import PLANS
from redwhale.engine.world import World, join
from redwhale.model import Llama, load_model

LENGTH, BATCH, STEPS, FIRST_NEW = 16, 8, 20, 80


@dataclass
class Case:
    """One stage, and how it trains."""

    stage: Stage
    loop: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    model: dict[str, Any] = field(default_factory=dict)
    before: str | None = None
    """The case whose model and optimizer state this one goes on with."""


def stage(*train: str, **options: Any) -> Stage:
    defaults = {"lr": 3e-3, "weight_decay": 0.1, "lora": LoRAConfig(r=4, alpha=8.0)}
    return Stage(name="s", train=train, tokens=STEPS * BATCH * LENGTH, **{**defaults, **options})


BLOCKS = BlockSchedule(layers=1, steps=3)
TRAIN = [
    *(("embed", "head"), ("norms",)),
    *(("embed.new", "head.new", "lora"), ("layers[1:3]", "head.new")),
    *(stage["train"] for plan in PLANS.values() for stage in plan if "blocks" not in stage),
]
"""What stages train: every kind of selector, and those of every plan."""
ONE = {"micro_batch_size": 8}
EQUAL = {"+".join(train): Case(stage(*train)) for train in TRAIN} | {
    "lisa": Case(stage("embed", "head", "layers", blocks=BLOCKS)),
    "badam": Case(stage("layers", blocks=BlockSchedule(layers=1, steps=3, order="cyclic"))),
    "tied": Case(stage("all"), model={"tie_word_embeddings": True}),
    "tied new rows": Case(stage("embed.new"), model={"tie_word_embeddings": True}),
    "many micro-batches": Case(stage("all"), {"micro_batch_size": 1}),
    "in backward, one micro-batch": Case(stage("all", in_backward=True), ONE),
    "in backward, no clipping": Case(stage("embed.new", "layers", in_backward=True, grad_clip=0.0)),
    "recomputed": Case(stage("all"), {"activations": "full", "z_loss": 1e-2}),
    "inherited": Case(stage("embed", "head", "layers.odd", inherit=True), before="embed+head"),
    "best": Case(stage("head"), {"validate_every": 4, "keep_best": True, "patience": 3}),
}
"""fp32: as good as equal to one process."""
HYBRID = {
    f"hybrid {name}": Case(EQUAL[name].stage, {**EQUAL[name].loop, "replicate": 2}, model=EQUAL[name].model)
    for name in ("all", "embed.new+head.new+lora", "in backward, no clipping")
}
"""The same with two groups of processes that hold the whole model each."""
WIDE = {"hidden_size": 256, "head_dim": 64}
CLOSE = {
    "8 bit": Case(stage("embed.new", "layers", optimizer="adamw_8bit"), dtype=torch.bfloat16, model=WIDE),
    "8 bit, stochastic": Case(
        stage("all", optimizer="adamw_8bit", masters="stochastic"), dtype=torch.bfloat16, model=WIDE
    ),
    "bf16": Case(stage("all", masters="split"), ONE, dtype=torch.bfloat16),
    "bf16, replicated": Case(stage("embed", "head"), {"replicate": 2}, dtype=torch.bfloat16),
    "bf16, many micro-batches": Case(stage("embed.new", "layers", "head"), {"micro_batch_size": 1}, torch.bfloat16),
}
"""Where sums in another order are rounded to something else, now and then."""
CASES = EQUAL | HYBRID | CLOSE


def write_data(folder: Path) -> None:
    """Counting in steps of 1 to 3, in documents of very different lengths; what is held out is noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    documents = []
    for length in rng.integers(2, 60, 120):
        start, stride = int(rng.integers(0, 94)), int(rng.integers(1, 4))
        documents.append([3 + (start + stride * i) % 94 for i in range(length)])
    noise = [rng.integers(3, 97, length).tolist() for length in (50, 3, 30, 20, 45)]
    for split, chosen in {"t": documents, "held": noise}.items():
        items = ((document, len(document)) for document in chosen)
        write_shard(folder / f"{split}-0", items, vocab_size=TINY.vocab_size, tokenizer_sha256="x")


def model_of(case: Case) -> Llama:
    return tiny_model(case.dtype, config=replace(TINY, num_hidden_layers=2, **case.model))


def trainer_of(case: Case, folder: Path, data: Path, world: World, *, every: int = 100, **options: Any) -> Trainer:
    train, held_out = (PackedSequences(TokenShards.open(data, split), LENGTH) for split in ("t", "held"))
    loop = {"batch_size": BATCH, "micro_batch_size": 4, "log_every": 1, "checkpoint_every": every, **case.loop}
    return Trainer(
        options.pop("model", None) or model_of(case),
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


class Crash(Exception):
    pass


def crash_at(step: int | None) -> Callable[[Trainer, int], None]:
    def crash(trainer: Trainer, done: int) -> None:
        if done == step:
            raise Crash

    return crash


def train(root: Path, world: World, name: str, *, folder: Path | None = None, until: int | None = None) -> None:
    """Train a case to its end, or until it crashes behind a step."""
    folder = folder or root / name / str(world.size)
    case, options = CASES[name], {"every": 6} if folder.name == "resumed" else {}
    if case.before is not None:
        earlier = root / case.before / str(world.size)
        options |= {"model": load_model(earlier / "model"), "inherited": load_file(earlier / "optimizer.safetensors")}
    trainer = trainer_of(case, folder, root / "data", world, on_step=crash_at(until), **options)
    try:
        result = trainer.run()
    except Crash:
        return
    trainer.save_model(folder / "model")
    state = trainer.inheritance()
    if world.is_first:
        save_file(state, folder / "optimizer.safetensors")
        (folder / "result.json").write_bytes(msgspec.json.encode(result))
    world.first(lambda: None)  # what a later case begins with is there


def resave(root: Path, world: World, name: str, source: str, target: str) -> None:
    """Read the latest state in one folder, and write it to another."""
    trainer = trainer_of(CASES[name], root / name / source, root / "data", world)
    with trainer._new_store() as store:
        loaded = store.load(None, trainer.train_step.wanted)
    assert loaded is not None
    step = loaded[1]["step"]
    trainer.train_step.load_state_tensors(loaded[0], step)
    trainer.folder = root / name / target
    with trainer._new_store() as store:
        store.save(step, trainer.train_step.state_tensors(), loaded[1])


def refuse(root: Path, world: World, name: str) -> None:
    """What is said of options that only one process can have, in `FOLDER/refused/RANK.json`."""
    case, said = CASES[name], {}
    for key, stage_options, loop_options in REFUSED:
        changed = Case(msgspec.structs.replace(case.stage, **stage_options), {**case.loop, **loop_options})
        try:
            trainer_of(changed, root / "refused", root / "data", world)
        except RecipeError as error:
            said[key] = str(error)
    (root / f"refused-{world.rank}.json").write_text(json.dumps(said), encoding="utf-8")


def interrupt(root: Path, world: World, name: str) -> None:
    """The last process alone gets SIGTERM behind step 9; what each of them ends with, in `FOLDER/stopped-RANK.json`."""

    def signal_last(trainer: Trainer, done: int) -> None:
        if done == 9 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = root / "interrupted"
    try:
        trainer_of(CASES[name], folder, root / "data", world, on_step=signal_last).run()
    except Interrupted as stop:
        (root / f"stopped-{world.rank}.json").write_text(json.dumps([stop.exit_code, str(stop)]), encoding="utf-8")


def tell(root: Path, world: World, name: str) -> None:
    """What the command line says of a recipe that is none, in `FOLDER/told-RANK`."""
    recipe = root / "bad.toml"
    if world.is_first:
        recipe.write_text('name = "bad"\n[base]\ncheckpoint = "none"\n[train]\nbatch_sise = 3\n', encoding="utf-8")
    world.first(lambda: None)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["train", str(recipe)])
    (root / f"told-{world.rank}").write_text(f"{code}\n{said.getvalue()}", encoding="utf-8")


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("bitsandbytes", {"optimizer": "bnb_adamw_8bit"}, {}),
    ("compile", {}, {"compile": True}),
    ("offload", {}, {"activations": "offload"}),
    ("FP8", {}, {"frozen": "fp8"}),
    ("auto", {}, {"micro_batch_size": "auto"}),
    ("batch", {}, {"batch_size": 5}),
    ("replicate", {}, {"replicate": 3}),
]
ACTIONS: dict[str, Callable[..., None]] = {
    "train": train,
    "until 7": lambda root, world, name: train(root, world, name, folder=root / name / "resumed", until=7),
    "until 13": lambda root, world, name: train(root, world, name, folder=root / name / "resumed", until=13),
    "to the end": lambda root, world, name: train(root, world, name, folder=root / name / "resumed"),
    "resave a": lambda root, world, name: resave(root, world, name, "resumed", "a"),
    "resave b": lambda root, world, name: resave(root, world, name, "a", "b"),
    "resave c": lambda root, world, name: resave(root, world, name, "b", "c"),
    "refuse": refuse,
    "interrupt": interrupt,
    "tell": tell,
}


def act(root: Path, action: str, names: list[str]) -> None:
    """Do something with cases in this process, one of those that its environment tells of."""
    world = join()
    world.start(torch.device("cpu"))
    for name in names:
        ACTIONS[action](root, world, name)
        gc.collect()
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
    root = Path(sys.argv[1])
    write_data(root / "data")
    for processes, action, *names in json.loads(sys.argv[2]):
        codes = fork(processes, lambda: act(root, action, names))  # noqa: B023 (called within the loop)
        if any(codes):
            sys.exit(f"{action} in {processes} processes ended with {codes}")

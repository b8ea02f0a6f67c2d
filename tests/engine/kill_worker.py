"""Trains in child processes that are killed again and again, and compares what they end with to an unkilled run.

Run as a program: `kill_worker.py FOLDER OPTIMIZER SEED`. Children are forks of this process, which has imported
everything and run nothing; each writes a byte to a pipe for every step and from within every write, so that kills can
be aimed. Prints one JSON object: how many kills came where, and what differs.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, tiny_model

from redwhale.engine import LoopConfig, PackedSequences, Stage, TokenShards, Trainer, checkpoints, write_shard
from redwhale.model import checkpoint, load_model, save_model
from redwhale.model.atomic_folder import replacing_folder

LENGTH, BATCH, STEPS = 16, 4, 12
EVENTS = {
    (stage, event): bytes([3 * stage + kind]) for stage in (0, 1) for kind, event in enumerate(("step", "write", "end"))
}
"""A byte for each: a step, within the write of a checkpoint, within that of the model that ends a stage."""
AIMS = [(stage, event) for stage in (0, 1) for event in ("step", "write", "step", "step", "end")]


def stages(optimizer: str) -> list[Stage]:
    options = {"tokens": LENGTH * BATCH * STEPS, "lr": 1e-2, "optimizer": optimizer, "weight_decay": 0.1}
    options["frozen"] = "fp8" if optimizer == "adamw_8bit" else "stored"
    return [
        Stage(name="embed", train=("embed", "head"), **options),
        Stage(name="odd", train=("embed", "head", "layers.odd"), inherit=True, **options),
    ]


def train(folder: Path, shards: Path, optimizer: str, report) -> None:
    """Both stages, going on from whatever `folder` holds; leaves every tensor of their ends in `folder/NAME/end`."""

    def slow_save(tensors, path, **options):
        save_file(tensors, path, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        report(number, "write" if path.name == "state.safetensors" else "end")
        time.sleep(0.02)
        path.write_bytes(whole)

    checkpoints.save_file = checkpoint.save_file = slow_save
    loop = LoopConfig(batch_size=BATCH, micro_batch_size=2, log_every=1, checkpoint_every=2)
    data = PackedSequences(TokenShards.open(shards, "t"), LENGTH)
    model, inherited = tiny_model(torch.bfloat16), None
    for number, stage in enumerate(stages(optimizer)):
        end = folder / stage.name / "end"
        if not end.exists():
            trainer = Trainer(
                model,
                stage,
                data,
                sequence_length=LENGTH,
                folder=folder / stage.name,
                loop=loop,
                seed=1,
                first_sequence=number * BATCH * STEPS,
                inherited=inherited,
                on_step=lambda trainer, step: report(number, "step"),  # noqa: B023 (called within the loop)
            )
            trainer.run()
            with replacing_folder(end) as staging:
                save_model(model, staging / "model")
                save_file(dict(trainer.inheritance()), staging / "inheritance.safetensors")
                save_file(dict(trainer.train_step.state_tensors()), staging / "state.safetensors")
        model, inherited = load_model(end / "model"), load_file(end / "inheritance.safetensors")


def start(*arguments) -> tuple[int, int]:
    """Fork a child that trains; returns its process id and the pipe that it reports to."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        train(*arguments, report=lambda *event: os.write(writing, EVENTS[event]))
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def finish(child: int, reading: int) -> int:
    """Wait for a child; returns minus the signal that ended it, or its exit code."""
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch(reading: int, event: bytes, count: int) -> bool:
    """Wait for the `count`-th event of a kind; returns whether it came."""
    while count and (found := os.read(reading, 1)):
        count -= found == event
    return not count


def metrics(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def differences(folder: Path, whole: Path, optimizer: str) -> list[str]:
    """Names of what is not the same to the bit at the end of the two runs."""
    found = []
    for stage in stages(optimizer):
        if metrics(folder / stage.name) != metrics(whole / stage.name):
            found.append(f"{stage.name}/metrics.jsonl")
        for file in ("model/model.safetensors", "inheritance.safetensors", "state.safetensors"):
            ours, expected = (load_file(run / stage.name / "end" / file) for run in (folder, whole))
            found += [f"{stage.name}/{name}" for name in ours.keys() ^ expected.keys()]
            for name in ours.keys() & expected.keys():
                pair = [run[name].contiguous().view(-1).view(torch.uint8) for run in (ours, expected)]
                if ours[name].dtype != expected[name].dtype or not torch.equal(*pair):
                    found.append(f"{stage.name}/{name}")
    return found


def main(folder: Path, optimizer: str, seed: int) -> dict[str, object]:
    rng, choose = np.random.default_rng(0), random.Random(seed)
    shards = folder / "shards"
    documents = [rng.integers(3, TINY.vocab_size, int(n)).tolist() for n in rng.integers(4, 40, 120)]
    shards.mkdir(parents=True)
    write_shard(shards / "t-0", ((d, len(d)) for d in documents), vocab_size=TINY.vocab_size, tokenizer_sha256="x")

    whole = folder / "whole"
    assert finish(*start(whole, shards, optimizer)) == 0
    runs, aims = [], AIMS.copy()
    killed = dict.fromkeys((f"{event} of stage {stage}" for stage, event in AIMS), 0)
    while aims:
        runs.append(folder / f"killed-{len(runs)}")
        status = -signal.SIGKILL
        while status:
            child, reading = start(runs[-1], shards, optimizer)
            if aims and watch(reading, EVENTS[aims[0]], choose.randint(1, 4) if aims[0][1] == "step" else 1):
                # Behind a step, or somewhere in the next ones; always within a write, which takes longer.
                time.sleep(choose.random() * (0.03 if aims[0][1] == "step" else 0.005))
                os.kill(child, signal.SIGKILL)
            watch(reading, b"", 1)
            status = finish(child, reading)
            assert status in (0, -signal.SIGKILL), status
            if status:
                stage, event = aims.pop(0)
                killed[f"{event} of stage {stage}"] += 1
    found = [difference for run in runs for difference in differences(run, whole, optimizer)]
    return {"killed": killed, "runs": len(runs), "differences": found}


if __name__ == "__main__":
    result = main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    sys.stdout.write(json.dumps(result) + "\n")

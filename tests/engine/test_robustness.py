"""Crashes between any two writes, full disks, missing sections, and settings that cannot work."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, tiny_model

from redwhale.engine import (
    CheckpointStore,
    LoopConfig,
    PackedSequences,
    Stage,
    TokenShards,
    Trainer,
    load_recipe,
    run_recipe,
    write_shard,
)
from redwhale.engine.cli import main
from redwhale.engine.conversations import read_conversations
from redwhale.engine.errors import RecipeError, RunError, TrainingError
from redwhale.engine.recipe import apply_override
from redwhale.engine.run_folder import RunFolder, StepResult


class Crash(BaseException):
    pass


def crash_at(monkeypatch, call: int) -> None:
    """Raise at the `call`-th change of the file system's names, before it happens."""
    count = 0

    def counted(original):
        def changed(*arguments, **options):
            nonlocal count
            count += 1
            if count == call:
                raise Crash
            return original(*arguments, **options)

        return changed

    for name in ("rename", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


# Finished work


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces"])
def test_a_crash_anywhere_in_finishing_costs_neither_the_work_nor_the_old_result(tmp_path, monkeypatch, replaces):
    def attempt(folder: Path, call: int | None) -> bool:
        """Finish step "b"; returns whether it crashed."""
        step = RunFolder(folder).step("train/1-a")
        work = step.begin("b")
        (work / "states").mkdir(exist_ok=True)
        (work / "out.bin").write_bytes(b"days of work")
        with monkeypatch.context() as patch:
            if call is not None:
                crash_at(patch, call)
            try:
                step.finish("b", {}, {}, StepResult({}, ["out.bin"], "in", "out", scratch=["states"]), 1.0)
            except Crash:
                return True
        return False

    def prepare(folder: Path) -> None:
        for digest in ("z", "a") if replaces else ():  # "z" becomes the .previous that has to go
            step = RunFolder(folder).step("train/1-a")
            (step.begin(digest) / "out.bin").write_bytes(b"old")
            step.finish(digest, {}, {}, StepResult({}, ["out.bin"], "in", "out"), 1.0)

    prepare(tmp_path / "whole")
    assert not attempt(tmp_path / "whole", None)
    for call in range(1, 20):
        folder = tmp_path / str(call)
        prepare(folder)
        if not attempt(folder, call):
            break
        step = RunFolder(folder).step("train/1-a")
        written = (step.partial / "manifest.json").exists()
        assert step.is_current("b") == written
        if written:
            assert (step.path / "out.bin").read_bytes() == b"days of work"
            assert sorted(path.name for path in step.path.iterdir()) == ["manifest.json", "out.bin"]
        else:  # the state is still there to go on from
            assert (step.begin("b") / "states").is_dir()
        if replaces:
            kept = [path for path in (step.path, step.path.with_name("1-a.previous")) if path.exists()]
            assert any((path / "out.bin").read_bytes() == b"old" for path in kept)
    assert call == (7 if replaces else 5)  # every name change was tried


def test_finished_work_for_another_digest_is_set_aside(tmp_path, monkeypatch):
    step = RunFolder(tmp_path).step("pack")
    (step.begin("a") / "out.bin").write_bytes(b"a")
    monkeypatch.setattr("redwhale.engine.run_folder.StepFolder._complete", lambda self, digest: None)
    step.finish("a", {}, {}, StepResult({}, ["out.bin"], "in", "out"), 1.0)
    monkeypatch.undo()
    assert not step.is_current("b")
    assert list(step.begin("b").iterdir()) == [step.partial / "started.json"]
    assert (tmp_path / "pack.partial.previous" / "out.bin").read_bytes() == b"a"


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"digest": ', b"\xff\xfe"])
def test_a_damaged_manifest_is_one_sentence_in_run_and_report(tmp_path, capfd, content):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "manifest.json").write_bytes(content)
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        RunFolder(tmp_path).step("pack").is_current("a")
    assert main(["report", str(tmp_path)]) == 2
    assert "manifest.json is damaged" in capfd.readouterr().err


def test_a_damaged_hash_cache_only_costs_time(tmp_path):
    (tmp_path / "in.txt").write_text("x")
    digest = RunFolder(tmp_path).file_hash(tmp_path / "in.txt")
    for damaged in (b"\xff", b"[1]", b"{"):
        (tmp_path / ".hashes.json").write_bytes(damaged)
        assert RunFolder(tmp_path).file_hash(tmp_path / "in.txt") == digest


# Training


@pytest.fixture
def sequences(tmp_path):
    rng = np.random.default_rng(0)
    documents = [(rng.integers(3, TINY.vocab_size, 16).tolist(), 16) for _ in range(16)]
    write_shard(tmp_path / "t-0", documents, vocab_size=TINY.vocab_size, tokenizer_sha256="x")
    return PackedSequences(TokenShards.open(tmp_path, "t"), 16)


def make_trainer(model, sequences, folder, **options):
    stage = Stage(name="s", train=("all",), tokens=16 * 4 * 8, lr=1e-2)
    loop = LoopConfig(batch_size=4, micro_batch_size=4, **options)
    return Trainer(model, stage, sequences, sequence_length=16, folder=folder, loop=loop)


def test_weights_that_are_not_finite_never_replace_a_saved_state(tmp_path, sequences):
    """From step 5 on the gradient is not finite, but the loss is."""
    training = make_trainer(
        tiny_model(), sequences, tmp_path / "run", log_every=1, checkpoint_every=1, keep_last=9, most_skipped=2
    )
    forward_backward = training.train_step.forward_backward

    def poisoned(step, *arguments):
        result = forward_backward(step, *arguments)
        if step >= 4:
            training.model.lm_head.weight.grad[0, 0] = float("inf")
        return result

    training.train_step.forward_backward = poisoned
    with pytest.raises(TrainingError, match=r"skipped its last 2 steps, 5 to 6.*the gradient norm inf"):
        training.run()
    store = CheckpointStore(tmp_path / "run" / "states")
    assert store.steps() == [1, 2, 3, 4, 5]
    states = [store.load(step)[0] for step in (4, 5)]
    names = [name for name in states[0] if name.startswith("optimizer.weight.")]
    assert names
    assert all(torch.equal(states[0][name], states[1][name]) for name in names)
    assert all(bool(tensor.isfinite().all()) for tensor in states[1].values() if tensor.dtype == torch.float32)


def test_too_little_gpu_memory_is_one_sentence(tmp_path, sequences):
    training = make_trainer(tiny_model(), sequences, tmp_path / "run")

    def out_of_memory(step, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 8")

    training.train_step.forward_backward = out_of_memory
    with pytest.raises(TrainingError, match=r"Tried to allocate 9\.00 GiB\): lower micro_batch_size \(now 4\)"):
        training.run()


# Recipes


def sections(text: str, *dropped: str) -> str:
    """The recipe without some top-level sections."""
    parts = re.split(r"(?m)^(?=\[)", text)
    return "".join(p for p in parts if not any(re.match(rf"\[+{name}[\].]", p) for name in dropped))


def variant(tiny_root: Path, folder: Path, *dropped: str, base: str | None = None) -> Path:
    text = sections((tiny_root / "tiny.toml").read_text(encoding="utf-8"), *dropped)
    if base is not None:
        text += f"\n[base]\n{base}\n"
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        (("filter",), "the recipe has no [filter] section to make it"),
        (("pack",), "the recipe has no [pack] section to make it"),
        (("init",), "add an [init] section"),
        (("init", "train"), "add an [init] section"),
        (("init", "train", "sft", "eval"), "add an [init] section"),
        (("tokenizer",), "[init] needs a [tokenizer] section"),
    ],
)
def test_a_missing_section_is_told_before_anything_runs(tiny_root, tmp_path, capfd, dropped, message):
    path = variant(tiny_root, tmp_path, *dropped)
    assert main(["run", str(path), f"runs={tmp_path}"]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_recipe_without_steps_says_so(finished, tiny_root, tmp_path):
    every = ("base", "filter", "tokenizer", "init", "pack", "train", "sft", "eval", "export")
    path = variant(tiny_root, tmp_path, *every, base=f'checkpoint = "{finished.run_dir}/base/model"')
    recipe = load_recipe(path, [f"runs={tmp_path}"])
    with pytest.raises(RecipeError, match="this recipe has no sections of steps"):
        run_recipe(recipe)
    with pytest.raises(RecipeError, match=r"this recipe has no \[base.pretrain\] section"):
        run_recipe(recipe, only="base")


def test_a_base_tokenizer_of_another_name_cannot_stand_beside_checkpoints(tiny_root, tmp_path):
    path = variant(tiny_root, tmp_path, "tokenizer", "init")
    with pytest.raises(RecipeError, match=r"'x/spm\.model' must be a file named tokenizer\.model"):
        run_recipe(load_recipe(path, ["base.tokenizer=x/spm.model"]))


def test_a_checkpoint_with_too_few_rows_is_refused_by_every_step_that_loads_it(finished, tiny_root, tmp_path, capfd):
    base = f'checkpoint = "{finished.run_dir}/base/model"\ntokenizer = "{finished.run_dir}/tokenizer/tokenizer.model"'
    path = variant(tiny_root, tmp_path, "base", "tokenizer", "init", "train", "filter", "pack", base=base)
    for step in ("sft", "eval", "export"):
        without_sft = path
        if step != "sft":
            without_sft = tmp_path / "no-sft.toml"
            without_sft.write_text(sections(path.read_text(encoding="utf-8"), "sft"), encoding="utf-8")
        assert main([step, str(without_sft), f"runs={tmp_path}", "name=r"]) == 2, step
        assert "has 600 rows but the tokenizer 900 pieces" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stages[0].beta1=1.0", r"train\.stages\[0\]\.beta1: Expected float < 1\.0"),
        ("seed=18446744073709551616", "seed: Expected int <= 4294967295"),
        ("base.pretrain.hidden_size=2", "hidden_size = 2 must be a multiple of twice num_attention_heads = 4"),
        ("base.pretrain.num_key_value_heads=3", "num_key_value_heads = 3 must divide num_attention_heads = 4"),
        ('sft.lora.targets=["lm_head"]', r"sft\.lora: cannot adapt 'lm_head'; known: q_proj"),
        ("sft.lora.targets=[]", r"sft\.lora\.targets: Expected array of length >= 1"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_the_recipe(tiny_root, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(tiny_root / "tiny.toml", [override])


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_a_device_that_nothing_was_written_for_is_refused(tiny_root, capfd, device):
    assert main(["run", str(tiny_root / "tiny.toml"), f"device={device}"]) == 2
    assert f"device '{device}' is not supported" in capfd.readouterr().err


def test_an_index_override_needs_an_entry():
    with pytest.raises(RecipeError, match=r"a has 0 entries"):
        apply_override({}, "a[0]=1")


# Data


@pytest.mark.slow
def test_a_run_without_validation_documents_goes_to_its_end(tiny_root, tmp_path):
    recipe = load_recipe(tiny_root / "tiny.toml", [f"runs={tmp_path}", "filter.validation_fraction=0"])
    run_recipe(recipe, say=lambda line: None)
    evaluated = json.loads((recipe.run_dir / "eval" / "manifest.json").read_text(encoding="utf-8"))["summary"]
    assert {tuple(measured["text"]) for measured in evaluated["checkpoints"].values()} == {("english",)}
    stage = json.loads((recipe.run_dir / "train" / "1-embed-head" / "manifest.json").read_text(encoding="utf-8"))
    assert list(stage["summary"]["before"]) == ["english"]


def test_a_held_out_domain_without_a_document_is_told_first(tiny_root, tmp_path, capfd):
    (tmp_path / "empty.jsonl").touch()
    override = f'heldout.law=["{tmp_path}/empty.jsonl"]'
    assert main(["run", str(tiny_root / "tiny.toml"), f"runs={tmp_path}", override]) == 2
    assert "heldout.law holds no document" in capfd.readouterr().err
    assert not list(tmp_path.rglob("manifest.json"))


def test_renaming_a_held_out_domain_evaluates_again(finished, tiny_root, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "tiny")
    text = (tiny_root / "tiny.toml").read_text(encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(text.replace("\nenglish = ", "\nlaw = "), encoding="utf-8")
    run_recipe(load_recipe(tmp_path / "tiny.toml", [f"runs={tmp_path}"]), only="eval", say=lambda line: None)
    evaluated = json.loads((tmp_path / "tiny" / "eval" / "manifest.json").read_text(encoding="utf-8"))["summary"]
    assert list(evaluated["checkpoints"]["sft"]["text"]) == ["korean", "law"]


def test_a_base_can_be_evaluated_before_anything_is_trained(finished, tiny_root, tmp_path):
    without = shutil.ignore_patterns("train", "sft", "eval", "export")
    shutil.copytree(finished.run_dir, tmp_path / "tiny", ignore=without)
    recipe = load_recipe(tiny_root / "tiny.toml", [f"runs={tmp_path}", 'eval.checkpoints=["base", "init"]'])
    lines: list[str] = []
    run_recipe(recipe, only="eval", say=lines.append)
    assert lines[0].startswith("eval: base, init on ")


def test_unicode_line_separators_do_not_cut_a_row_of_instruction_data(tmp_path):
    contents = ["첫째\u2028둘째", "셋째\u0085넷째\x1c"]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=True)]
    # DEL to U+009F and U+2028 may stand in JSON as they are; U+001C may not, so json escapes it.
    row = json.dumps({"messages": messages}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n{row}\n".encode())
    conversations, problems = read_conversations([tmp_path / "rows.jsonl"])
    assert problems == []
    assert [[message.content for message in conversation.messages] for conversation in conversations] == [contents] * 2


def test_usable_held_out_rows_do_not_hide_that_the_training_rows_are_not(tiny_root, tmp_path, capfd):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    override = f'sft.data=["{tmp_path}/bad.jsonl"]'
    assert main(["run", str(tiny_root / "tiny.toml"), f"runs={tmp_path}", override]) == 2
    assert "no usable row in" in capfd.readouterr().err
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(("batch_size", "epochs"), [(128, 1), (128, 2), (5, 1), (2, 3)])
def test_fine_tuning_sees_the_data_as_often_as_the_epochs_say(finished, tiny_root, tmp_path, batch_size, epochs):
    without = shutil.ignore_patterns("sft", "eval", "export")
    shutil.copytree(finished.run_dir, tmp_path / "tiny", ignore=without)
    overrides = [f"runs={tmp_path}", f"sft.batch_size={batch_size}", f"sft.epochs={epochs}"]
    run_recipe(load_recipe(tiny_root / "tiny.toml", overrides), only="sft", say=lambda line: None)
    manifest = json.loads((tmp_path / "tiny" / "sft" / "manifest.json").read_text(encoding="utf-8"))
    steps, tokens = manifest["summary"]["steps"], manifest["summary"]["tokens"]
    reference = json.loads((finished.run_dir / "sft" / "manifest.json").read_text(encoding="utf-8"))["summary"]
    sequences = reference["tokens"] // 256  # of one conversation each, in batches of 2 that divide them
    assert sequences * epochs <= tokens // 256 < sequences * epochs + steps


# Full disks


@pytest.mark.slow
def test_a_write_that_the_system_refuses_is_one_sentence_and_the_run_goes_on_from_there(finished, tiny_root, tmp_path):
    """A limit on the size of files stands for a full disk: it stops the first checkpoint in the middle of its file."""
    without = shutil.ignore_patterns("train", "sft", "eval", "export")
    shutil.copytree(finished.run_dir, tmp_path / "tiny", ignore=without)
    command = ["train", str(tiny_root / "tiny.toml"), f"runs={tmp_path}"]
    limit = 200_000  # of a file, in bytes: the state of the first stage is larger, everything else smaller
    result = subprocess.run(
        [sys.executable, "-m", "redwhale.engine.cli", *command],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"redwhale: {os.strerror(27)} ({tmp_path}/tiny/train/1-embed-head.partial/states)"
    ]
    assert main(command) == 0
    expected = (finished.run_dir / "train" / "4-lora" / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "tiny" / "train" / "4-lora" / "model" / "model.safetensors").read_bytes() == expected

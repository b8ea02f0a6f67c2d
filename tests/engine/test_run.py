"""The whole recipe, as a user runs it: every step, skipping, killing, resuming, and what goes wrong."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from redwhale.engine import load_recipe, run_recipe
from redwhale.engine.cli import main
from redwhale.engine.errors import CheckpointError
from redwhale.engine.pipeline import STEPS
from redwhale.model import load_adapter, load_model, merge_lora

CLI = [sys.executable, "-m", "redwhale.engine.cli"]
STAGES = ["1-embed-head", "2-odd", "3-even", "4-lora"]


def manifest(run: Path, step: str) -> dict:
    return json.loads((run / step / "manifest.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def copy_run(finished, target: Path, *, without: tuple[str, ...]) -> list[str]:
    """A copy of the finished run lacking some steps; returns the overrides that point a command at it."""
    shutil.copytree(finished.run_dir, target / "tiny", ignore=lambda _, names: set(names) & set(without))
    return [f"runs={target}"]


def run_cli(capfd, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capfd.readouterr()
    return code, out, err


# What a whole run leaves


def test_every_step_leaves_a_manifest_with_hashes_and_versions(finished):
    steps = [name for name in STEPS if name != "train"] + [f"train/{stage}" for stage in STAGES]
    for step in steps:
        content = manifest(finished.run_dir, step)
        assert content["step"] == step
        assert len(content["digest"]) == 64
        assert content["inputs"]
        assert "torch" in content["versions"]
    assert not list(finished.run_dir.rglob("*.partial"))
    assert not list(finished.run_dir.rglob("states"))


def test_the_loss_falls_in_every_stage(finished):
    for step in ["base", *(f"train/{stage}" for stage in STAGES), "sft"]:
        content = manifest(finished.run_dir, step)
        assert content["after"] < content["before"], step


def test_a_stage_starts_where_the_one_before_it_ended(finished):
    for earlier, later in itertools.pairwise(STAGES):
        before = manifest(finished.run_dir, f"train/{later}")["before"]
        assert before == manifest(finished.run_dir, f"train/{earlier}")["after"]


def test_each_stage_on_disk_changes_exactly_what_it_names(finished):
    def is_trained(stage: str, name: str) -> bool:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        return {
            "1-embed-head": name in ("model.embed_tokens.weight", "lm_head.weight"),
            "2-odd": layer in (1, 3),
            "3-even": layer in (0, 2),
            "4-lora": layer is not None and "_proj" in name,
        }[stage]

    previous = weights(finished.run_dir / "init" / "model")
    for stage in STAGES:
        current = weights(finished.run_dir / "train" / stage / "model")
        assert current.keys() == previous.keys()
        for name in current:
            assert torch.equal(current[name], previous[name]) != is_trained(stage, name), (stage, name)
        previous = current


@pytest.mark.parametrize(("step", "start"), [("train/4-lora", "train/3-even"), ("sft", "train/4-lora")])
def test_an_adapter_turns_the_model_before_it_into_the_model_beside_it(finished, step, start):
    adapter = finished.run_dir / step / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    model = load_model(Path(config["base_model_name_or_path"]))
    before = weights(finished.run_dir / start / "model")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    load_adapter(model, adapter)
    merge_lora(model)
    after = weights(finished.run_dir / step / "model")
    assert all(torch.equal(after[name], tensor) for name, tensor in model.state_dict().items())


def test_old_rows_survive_initialisation_bit_by_bit(finished):
    base, extended = weights(finished.run_dir / "base" / "model"), weights(finished.run_dir / "init" / "model")
    added = manifest(finished.run_dir, "tokenizer")["summary"]["added"]
    assert added > 50
    for name, tensor in base.items():
        rows = tensor.shape[0]
        assert torch.equal(extended[name][:rows], tensor), name
        expected = rows + added if name in ("model.embed_tokens.weight", "lm_head.weight") else rows
        assert extended[name].shape[0] == expected


def test_the_filter_counts_every_document(finished):
    summary = manifest(finished.run_dir, "filter")["summary"]
    dropped = {rule["name"]: rule["dropped_documents"] for rule in summary["rules"] if rule["dropped_documents"]}
    assert dropped["exact_duplicate"] == 1
    assert dropped["length"] == 1
    assert sum(dropped.values()) == summary["documents_in"] - summary["documents_out"] == 3


def test_shards_hold_the_filtered_corpus(finished):
    from pyarrow import parquet

    from redwhale.engine import TokenShards
    from redwhale.tokenizer import Tokenizer

    tokenizer = Tokenizer(finished.run_dir / "tokenizer" / "tokenizer.model")
    for split in ("train", "validation"):
        shards = TokenShards.open(finished.run_dir / "pack", split, tokenizer_sha256=tokenizer.sha256, verify=True)
        texts = parquet.read_table(finished.run_dir / "filter" / f"{split}-00000.parquet")["text"].to_pylist()
        ids = [t for text in texts for t in (tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id)]
        assert shards.read(0, shards.tokens).tolist() == ids
        assert shards.text_bytes == sum(len(text.encode()) for text in texts)


def test_the_export_agrees_with_transformers_and_carries_its_template(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = finished.run_dir / "export" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "안녕?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id == 2
    verification = manifest(finished.run_dir, "export")["summary"]["verification"]
    assert verification["same_ids"]
    assert verification["relative_difference"] < 1e-5
    assert torch.equal(model.lm_head.weight, weights(finished.run_dir / "sft" / "model")["lm_head.weight"])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| embed-head | embed + head |" in card


def test_an_export_that_computes_something_else_is_refused(finished, tmp_path, monkeypatch):
    overrides = copy_run(finished, tmp_path, without=("export",))
    monkeypatch.setattr("redwhale.engine.steps.export.load_model", _perturbed)
    recipe = load_recipe(finished.run_dir.parents[1] / "tiny.toml", overrides)
    with pytest.raises(CheckpointError, match="transformers computes other logits"):
        run_recipe(recipe, only="export", say=lambda line: None)
    assert not (tmp_path / "tiny" / "export").exists()


def _perturbed(folder, **options):
    from redwhale.model import load_model

    model = load_model(folder, **options)
    with torch.no_grad():
        model.lm_head.weight[5] += 1.0
    return model


def test_evaluation_covers_every_checkpoint_domain_and_task(finished):
    checkpoints = manifest(finished.run_dir, "eval")["summary"]["checkpoints"]
    assert list(checkpoints) == ["base", "init", "train", "sft"]
    for measured in checkpoints.values():
        assert set(measured["text"]) == {"korean", "english"}
        assert {task: result["n"] for task, result in measured["kobest"].items()} == dict.fromkeys(
            ("boolq", "copa", "hellaswag", "sentineg", "wic"), 20
        )
    korean = [measured["text"]["korean"]["bits_per_byte"] for measured in checkpoints.values()]
    assert korean[2] < korean[1]


def test_the_report_is_one_page_that_needs_nothing_else(finished, capfd):
    code, out, _ = run_cli(capfd, "report", str(finished.run_dir))
    assert code == 0
    page = Path(out.strip()).read_text(encoding="utf-8")

    class Resources(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "img", "iframe")
            for name, value in attrs:
                assert name not in ("src", "href", "xlink:href") or value.startswith("#"), (tag, name, value)

    Resources().feed(page)
    assert page.count("<svg") >= 3
    for expected in ("exact_duplicate", "token ratio", "train/4-lora", "bits per byte", "hellaswag"):
        assert expected in page


# Skipping and redoing


def test_a_second_run_does_nothing(finished, capfd):
    before = {path: path.stat().st_mtime_ns for path in finished.run_dir.rglob("manifest.json")}
    lines: list[str] = []
    run_recipe(finished, say=lines.append)
    assert len(lines) == len(before) == 12
    assert all(line.endswith(": up to date") for line in lines)
    assert {path: path.stat().st_mtime_ns for path in finished.run_dir.rglob("manifest.json")} == before


def test_a_changed_stage_redoes_itself_and_what_follows_only(finished, tmp_path):
    overrides = copy_run(finished, tmp_path, without=("sft", "eval", "export"))
    recipe = load_recipe(finished.run_dir.parents[1] / "tiny.toml", [*overrides, "train.stages[2].lr=1e-3"])
    lines: list[str] = []
    run_recipe(recipe, only="train", say=lines.append)
    assert [line.endswith("up to date") for line in lines] == [True, True, False, False]
    old = weights(tmp_path / "tiny" / "train" / "3-even.previous" / "model")
    assert torch.equal(
        old["model.layers.0.mlp.up_proj.weight"],
        weights(finished.run_dir / "train" / "3-even" / "model")["model.layers.0.mlp.up_proj.weight"],
    )


def test_a_renamed_stage_leaves_the_report(finished, tmp_path, capfd):
    overrides = copy_run(finished, tmp_path, without=("4-lora", "sft", "eval", "export"))
    recipe = str(finished.run_dir.parents[1] / "tiny.toml")
    # Overrides may also stand behind an option.
    assert main(["train", recipe, "--debug", *overrides, "train.stages[2].name=renamed"]) == 0
    assert (tmp_path / "tiny" / "train" / "3-even").exists()
    code, out, _ = run_cli(capfd, "report", str(tmp_path / "tiny"))
    assert code == 0
    page = Path(out.strip().splitlines()[-1]).read_text(encoding="utf-8")
    assert "train/3-renamed" in page
    assert "train/3-even" not in page


@pytest.mark.parametrize("override", ["train.log_every=3", "train.checkpoint_every=2", "filter.workers=2"])
def test_settings_that_change_no_result_redo_nothing(finished, override):
    recipe = load_recipe(finished.run_dir.parents[1] / "tiny.toml", [override])
    lines: list[str] = []
    run_recipe(recipe, say=lines.append)
    assert all(line.endswith(": up to date") for line in lines)


def test_the_same_seed_gives_the_same_weights(finished, tmp_path):
    recipe = load_recipe(finished.run_dir.parents[1] / "tiny.toml", [f"runs={tmp_path}"])
    for step in ("base", "filter", "tokenizer", "init", "pack"):
        run_recipe(recipe, only=step, say=lambda line: None)
        assert manifest(tmp_path / "tiny", step)["outputs"] == manifest(finished.run_dir, step)["outputs"], step


# Killing


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        if metrics.exists():
            steps = [json.loads(line)["step"] for line in metrics.read_text().split("\n")[:-1]]
            if steps and steps[-1] >= step:
                return
        time.sleep(0.002)
    raise AssertionError(f"{metrics} never reached step {step}")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(finished, tmp_path):
    """SIGKILL before the first saved state of a stage, between two, and late; in three of the four stages."""
    overrides = copy_run(finished, tmp_path, without=("train", "sft", "eval", "export"))
    command = [*CLI, "train", str(finished.run_dir.parents[1] / "tiny.toml"), *overrides, "train.log_every=1"]
    run = tmp_path / "tiny"
    for stage, step in (("1-embed-head", 3), ("1-embed-head", 17), ("2-odd", 25), ("4-lora", 12)):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            wait_for_step(run / "train" / f"{stage}.partial" / "metrics.jsonl", step, process)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not (run / "train" / stage).exists()
    assert main(command[3:]) == 0
    for stage in STAGES:
        expected = (finished.run_dir / "train" / stage / "model" / "model.safetensors").read_bytes()
        assert (run / "train" / stage / "model" / "model.safetensors").read_bytes() == expected, stage
        assert manifest(run, f"train/{stage}")["after"] == manifest(finished.run_dir, f"train/{stage}")["after"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_the_very_step_and_the_next_run_goes_on(finished, tmp_path, number):
    overrides = copy_run(finished, tmp_path, without=("train", "sft", "eval", "export"))
    quiet = ["train.log_every=1", "train.checkpoint_every=1000"]
    command = [*CLI, "train", str(finished.run_dir.parents[1] / "tiny.toml"), *overrides, *quiet]
    partial = tmp_path / "tiny" / "train" / "1-embed-head.partial"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(partial / "metrics.jsonl", 5, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "is saved at step" in err
    assert len(err.strip().splitlines()) == 1
    (state,) = (partial / "states").iterdir()
    assert int(state.name.removeprefix("step-")) >= 5
    assert main(command[3:]) == 0
    expected = (finished.run_dir / "train" / "4-lora" / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "tiny" / "train" / "4-lora" / "model" / "model.safetensors").read_bytes() == expected


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.stages[0].lr=oops"], "train.stages[0].lr: Expected float, got str ('oops')"),
        (['filter.inputs=["no/such/corpus"]'], "'no/such/corpus' does not exist"),
        (['heldout.english=["no/such/file.jsonl"]'], "'no/such/file.jsonl' does not exist"),
        (['sft.data=["no/such.jsonl"]'], "no/such.jsonl does not exist"),
        (["base.tokenizer=no/such.model"], "no/such.model"),
        (["eval.kobest=no/such"], "no/such"),
        (["trane.x=1"], "unknown field trane"),
        (["device=cuda:99"], "device 'cuda:99' is not on this machine"),
    ],
)
def test_user_errors_are_one_sentence_with_exit_code_2(finished, capfd, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in finished.run_dir.rglob("*") if path.is_file()}
    code, _, err = run_cli(capfd, "run", str(finished.run_dir.parents[1] / "tiny.toml"), *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    after = {path: path.stat().st_mtime_ns for path in finished.run_dir.rglob("*") if path.is_file()}
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed <= {".lock", ".hashes.json"}


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_truncated_shard_is_one_sentence_with_exit_code_2(finished, tmp_path, capfd, command):
    overrides = copy_run(finished, tmp_path, without=("train", "sft", "eval", "export"))
    shard = tmp_path / "tiny" / "pack" / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    code, _, err = run_cli(capfd, command, str(finished.run_dir.parents[1] / "tiny.toml"), *overrides)
    assert code == 2
    assert "train-00000.bin" in err
    assert "truncated" in err
    assert len(err.strip().splitlines()) == 1


def test_debug_shows_the_traceback(capfd):
    code, _, err = run_cli(capfd, "run", "missing.toml", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_a_step_without_what_it_needs_says_what_to_run(finished, tmp_path, capfd):
    recipe = str(finished.run_dir.parents[1] / "tiny.toml")
    code, _, err = run_cli(capfd, "pack", recipe, f"runs={tmp_path}")
    assert code == 2
    assert "run the step 'filter' first" in err


def test_the_wrong_tokenizer_for_a_checkpoint_is_refused(finished, tmp_path, capfd):
    overrides = copy_run(finished, tmp_path, without=("base", "init", "pack", "train", "sft", "eval", "export"))
    checkpoint = finished.run_dir / "export" / "model"  # its vocabulary is the hybrid's, the base's is smaller
    recipe = (finished.run_dir.parents[1] / "tiny.toml").read_text(encoding="utf-8")
    head, _, tail = recipe.partition("[base.pretrain]")
    path = tmp_path / "tiny.toml"
    path.write_text(
        head.replace("[base]", f'[base]\ncheckpoint = "{checkpoint}"') + tail[tail.index("[filter]") :],
        encoding="utf-8",
    )
    code, _, err = run_cli(capfd, "init", str(path), *overrides)
    assert code == 2
    assert "it is not this checkpoint's tokenizer" in err


# Generation and the core dependencies


def test_generate_continues_the_prompt_greedily_as_transformers_does(finished, capfd):
    from transformers import AutoModelForCausalLM

    from redwhale.tokenizer import Tokenizer

    folder = finished.run_dir / "export" / "model"
    code, out, _ = run_cli(capfd, "generate", str(folder), "The value of", "--max-new-tokens", "12")
    assert code == 0
    tokenizer = Tokenizer(folder / "tokenizer.model")
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("The value of")]])
    reference = AutoModelForCausalLM.from_pretrained(folder)
    expected = reference.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    assert out.rstrip("\n") == tokenizer.decode([i for i in expected if i > 2]).rstrip("\n")


@pytest.mark.slow
def test_training_needs_the_core_dependencies_alone(finished, tmp_path):
    """With every optional package blocked, `redwhale train` trains."""
    overrides = copy_run(finished, tmp_path, without=("train", "sft", "eval", "export"))
    extras = ("pyarrow", "zstandard", "matplotlib", "transformers", "tokenizers", "pytest", "hypothesis")
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({extras!r}))\n"
        "from redwhale.engine.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    recipe = str(finished.run_dir.parents[1] / "tiny.toml")
    result = subprocess.run(
        [sys.executable, "-c", program, "train", recipe, *overrides], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tiny" / "train" / "4-lora" / "model" / "model.safetensors").exists()
    result = subprocess.run(
        [sys.executable, "-c", program, "report", str(tmp_path / "tiny")], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (
        2,
        'redwhale: the report needs matplotlib: pip install "redwhale[report]"\n',
    )

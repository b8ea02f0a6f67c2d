"""`redwhale new` and `redwhale upscale`, as they are typed."""

import hashlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from redwhale.engine.cli import _parser, main
from redwhale.model import PRESETS, CheckpointReader, create_checkpoint, load_model, parameter_count, read_config

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def refusal(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("redwhale: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_new_writes_what_create_checkpoint_does(tmp_path, capsys):
    assert main(["new", "tiny-solar-10.7b", str(tmp_path / "a"), "--seed", "5"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}: 448,320 parameters, 0.9 MB\n"
    create_checkpoint(PRESETS["tiny-solar-10.7b"], tmp_path / "b", seed=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_news_options_reach_the_checkpoint(tmp_path, capsys):
    (tmp_path / "new").mkdir()  # empty: may be used
    command = ["new", "tiny-llama-3-8b", str(tmp_path / "new"), "--vocab-size", "333", "--dtype", "fp32"]
    assert main(command) == 0
    assert "parameters, 1.0 MB" in capsys.readouterr().out
    config = read_config(tmp_path / "new")
    assert (config.vocab_size, config.rope_theta, config.eos_token_id) == (333, 500_000.0, 2)
    model = load_model(tmp_path / "new")
    assert model.lm_head.weight.shape == (333, 64)
    assert model.lm_head.weight.dtype == torch.float32


def test_the_list_has_every_preset_with_its_size(capsys):
    assert main(["new", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: re.split(r" {2,}", line) for line in lines[1:]}
    assert list(rows) == list(PRESETS)
    assert len({len(line) for line in lines}) == 1
    assert rows["solar-10.7b"] == ["solar-10.7b", "llama", "48", "4,096", "32,000", "10,731,524,096", "21.5 GB"]
    for name, config in PRESETS.items():
        assert rows[name][1:6] == [
            config.model_type,
            *(f"{size:,}" for size in (config.num_hidden_layers, config.hidden_size, config.vocab_size)),
            f"{parameter_count(config):,}",
        ]


def test_upscale_makes_a_deeper_checkpoint(tmp_path, capsys):
    create_checkpoint(PRESETS["tiny-mistral-7b-v0.1"], tmp_path / "base")
    assert main(["upscale", str(tmp_path / "base"), str(tmp_path / "deep")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'deep'}: 6 layers out of 4, 448,320 parameters\n"
    assert main(["upscale", str(tmp_path / "base"), str(tmp_path / "other"), "--first", "4", "--last", "1"]) == 0
    base, other = CheckpointReader(tmp_path / "base"), CheckpointReader(tmp_path / "other")
    assert other.config.num_hidden_layers == 5
    norm, up = "model.norm.weight", "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(other.tensor(norm), base.tensor(norm))
    for layer, source in enumerate([0, 1, 2, 3, 3]):
        assert torch.equal(other.tensor(up.format(layer)), base.tensor(up.format(source)))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    base, taken = tmp_path / "base", tmp_path / "taken"
    create_checkpoint(PRESETS["tiny-mistral-7b-v0.1"], base)
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(base)
    for folder in (taken, tmp_path / "file", base):
        for command in (["new", "tiny-llama-2-7b", folder], ["upscale", base, folder]):
            message = refusal(capsys, *command)
            assert f"{folder} exists already and is not an empty folder: name another, or remove it first" in message
    assert (taken / "thesis.txt").read_text() == "mine"
    assert contents(base) == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "taken", "file"}


def test_what_cannot_be_made_is_refused_in_one_sentence(tmp_path, capsys):
    target = tmp_path / "out"
    assert "needs a preset and a folder; `redwhale new --list` shows" in refusal(capsys, "new")
    assert "needs a preset and a folder" in refusal(capsys, "new", "tiny-llama-2-7b")
    assert "there is no preset 'solar'; presets: solar-10.7b" in refusal(capsys, "new", "solar", target)
    assert "vocabulary of 0 is too small" in refusal(capsys, "new", "tiny-llama-2-7b", target, "--vocab-size", 0)
    assert "is not a checkpoint folder" in refusal(capsys, "upscale", tmp_path / "none", target)
    create_checkpoint(PRESETS["tiny-mistral-7b-v0.1"], tmp_path / "base")
    message = refusal(capsys, "upscale", tmp_path / "base", target, "--first", 5)
    assert "the base has 4 layers, so the first 5 and the last 3 cannot be taken" in message
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_the_documents_command_lines_are_understood():
    lines = re.findall(r"^redwhale .*$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    assert {command[0] for command in commands} >= {"new", "upscale"}
    for command in commands:
        options = _parser().parse_args(command)
        assert getattr(options, "preset", None) in {None, *PRESETS}


@pytest.mark.parametrize("command", ["new", "upscale"])
def test_help_explains_the_options(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "FOLDER" in capsys.readouterr().out

"""Several processes that share a model end with what one process ends with: losses, weights, saved states."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import (
    CASES,
    CLOSE,
    EQUAL,
    HYBRID,
    REFUSED,
    STEPS,
    Crash,
    crash_at,
    metrics,
    model_of,
    trainer_of,
)
from safetensors.torch import load_file

from redwhale.engine.sharded_checkpoints import read_parts
from redwhale.engine.world import ALONE

TESTS = Path(__file__).resolve().parents[1]
RESHARDED = ("8 bit", "lisa")
FOUR = [*HYBRID, "lora"]
ADAPTERS = "lora"


def left_by(factory: pytest.TempPathFactory, name: str, *plan: list[object]) -> Path:
    """What the worker leaves of a plan; done once, even where pytest itself has several processes."""
    shared = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder = shared / f"distributed-{name}"
    command = [sys.executable, str(TESTS / "distributed_worker.py"), str(folder), json.dumps(plan)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    with open(shared / f"distributed-{name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
            (folder / "error").write_text(done.stderr if done.returncode else "", encoding="utf-8")
    error = (folder / "error").read_text(encoding="utf-8")
    assert not error, error[-4000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process leaves."""
    return left_by(tmp_path_factory, "one", [1, "train", *EQUAL, *CLOSE])


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two leave."""
    plan = ([2, "train", *EQUAL, *CLOSE], [2, "refuse", "all"], [2, "interrupt", "all"], [2, "tell", "all"])
    return left_by(tmp_path_factory, "two", *plan)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """What four leave, and others that go on from them."""
    return left_by(
        tmp_path_factory,
        "four",
        [4, "train", *FOUR],
        [4, "until 7", *RESHARDED],
        [2, "resave a", *RESHARDED],
        [1, "resave b", *RESHARDED],
        [4, "resave c", *RESHARDED],
        [2, "until 13", *RESHARDED],
        [1, "to the end", *RESHARDED],
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def trained(folder: Path) -> list[dict]:
    return [line for line in metrics(folder) if "lr" in line]


def assert_equal(ours: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Every weight, and everything that is logged of a step, up to what the order of a sum makes."""
    found, wanted = weights(ours), weights(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert (found[name].double() - tensor.double()).norm() <= tolerance * tensor.double().norm(), name
    lines, others = metrics(ours), metrics(expected)
    assert len(lines) == len(others) > STEPS // 2
    for line, other in zip(lines, others, strict=True):
        for key in ("step", "tokens", "lr", "skipped_steps", "position", "stage"):
            assert line.get(key) == other.get(key)
        for key in {"loss", "lse", "grad_norm"} & other.keys():
            assert line[key] == pytest.approx(other[key], rel=tolerance), (line["step"], key)
        if "validation" in other:
            result, target = line["validation"]["counting"], other["validation"]["counting"]
            assert result["tokens"] == target["tokens"]
            assert result["loss"] == pytest.approx(target["loss"], rel=tolerance)
    results = [json.loads((folder / "result.json").read_text()) for folder in (ours, expected)]
    for key in ("steps", "tokens", "trained_parameters", "skipped_steps", "best_step"):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_end_with_the_losses_and_weights_of_one(one, two, name):
    assert_equal(two / name / "2", one / name / "1")


@pytest.mark.parametrize("name", CLOSE)
def test_where_sums_are_rounded_two_processes_stay_close_to_one(one, two, name):
    ours, expected = trained(two / name / "2"), trained(one / name / "1")
    assert ours[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert ours[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=2e-3)
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in expected], rel=1e-2)
    assert ours[-1]["loss"] < 0.97 * ours[0]["loss"]


def test_the_optimizer_state_that_is_handed_over_is_that_of_one_process(one, two):
    ours, expected = (load_file(folder / "embed+head" / n / "optimizer.safetensors") for folder, n in
                      ((two, "2"), (one, "1")))  # fmt: skip
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert ours[key].shape == tensor.shape
        assert (ours[key] - tensor).double().norm() <= 1e-4 * tensor.double().norm(), key


def test_the_best_weights_are_those_of_an_earlier_step(one):
    """Else the test above would show nothing for them."""
    result = json.loads((one / "best" / "1" / "result.json").read_text())
    assert result["best_step"] < result["steps"] < STEPS


def test_adapters_are_left_for_peft(one, two):
    ours, expected = (load_file(folder / ADAPTERS / n / "adapter" / "adapter_model.safetensors")
                      for folder, n in ((two, "2"), (one, "1")))  # fmt: skip
    assert ours.keys() == expected.keys()
    assert all((ours[key] - expected[key]).norm() <= 1e-5 * expected[key].norm() for key in expected)


def test_what_only_one_process_can_do_is_refused_by_every_process_in_one_sentence(two):
    said = [json.loads((two / f"refused-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].keys() == {key for key, _, _ in REFUSED}
    assert all("\n" not in sentence for sentence in said[0].values())
    assert "adamw_8bit" in said[0]["bitsandbytes"]


def test_a_bad_recipe_is_told_once(two):
    said = [(two / f"told-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert [lines[0] for lines in said] == ["2", "2"]
    sentences = said[0][1:] + said[1][1:]
    assert len(sentences) == 1
    assert "batch_sise" in sentences[0]


def test_a_signal_to_one_process_lets_all_save_the_same_step_and_stop(two):
    said = [json.loads((two / f"stopped-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    code, sentence = said[0]
    assert code == 128 + 15
    assert "is saved at step 10;" in sentence
    assert [path.name for path in (two / "interrupted" / "states").iterdir()] == ["step-00000010"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HYBRID, "lora"])
def test_four_processes_and_two_groups_of_two_end_with_the_losses_and_weights_of_one(one, four, name):
    assert_equal(four / name / "4", one / name.removeprefix("hybrid ") / "1")


def whole_state(case: str, folder: Path, root: Path) -> dict[str, torch.Tensor]:
    """All of the latest saved state, as one process reads it."""
    train_step = trainer_of(CASES[case], folder, root / "data", ALONE).train_step
    (path,) = sorted((folder / "states").glob("step-*"))
    return read_parts(path, train_step.wanted(int(path.name.removeprefix("step-"))))


@pytest.mark.slow
@pytest.mark.parametrize("name", RESHARDED)
def test_a_state_saved_by_four_is_read_to_the_bit_by_two_then_by_one_then_by_four(one, four, name):
    expected = whole_state(name, four / name / "a", four)
    assert {key.partition(".")[0] for key in expected} >= {"optimizer", "guard", "sums"}
    for folder in ("b", "c"):
        found = whole_state(name, four / name / folder, four)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert (four / name / "b" / "states" / "step-00000006" / "state.safetensors").exists()
    assert not (four / name / "c" / "states" / "step-00000006" / "state.safetensors").exists()


@pytest.mark.slow
def test_a_model_is_exported_by_one_process_from_a_state_that_two_saved(four, tmp_path):
    trainer = trainer_of(CASES["lisa"], four / "lisa" / "a", four / "data", ALONE)
    assert trainer.load_saved() == 6
    trainer.save_model(tmp_path / "a" / "model")
    unsaved = trainer_of(CASES["lisa"], tmp_path / "run", four / "data", ALONE, on_step=crash_at(6))
    with pytest.raises(Crash):
        unsaved.run()
    for name, tensor in weights(tmp_path / "a").items():
        expected = unsaved.model.state_dict()[name]
        assert (tensor - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.slow
def test_a_run_of_four_goes_on_with_two_and_then_with_one(one, four):
    """Stopped behind steps 7 and 13, it goes on from those saved at 6 and 12."""
    assert_equal(four / "lisa" / "resumed", one / "lisa" / "1")
    losses = [[line["loss"] for line in trained(folder)] for folder in (four / "8 bit/resumed", one / "8 bit/1")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_the_exported_folder_has_the_logits_of_transformers(two):
    transformers = pytest.importorskip("transformers")
    from redwhale.model import PackedDocuments, load_model

    folder = two / "all" / "2" / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 40)
    with torch.no_grad():
        ours = load_model(folder)(ids, PackedDocuments.from_lengths([len(ids)]))
        assert torch.allclose(ours, theirs(ids[None]).logits[0], atol=1e-5)
    assert not all(torch.equal(tensor, weights(folder.parent)[name])
                   for name, tensor in model_of(CASES["all"]).state_dict().items())  # fmt: skip

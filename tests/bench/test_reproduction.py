"""The reproduction: its conclusions follow from paired seeds, its runs are kept, its page says what the results say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
import zstandard
from tiny import english_texts, korean_texts, write_tiny_data

from redwhale.model import Llama, ModelConfig, save_model

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

from reproduction import page  # noqa: E402
from reproduction.conclusions import changes, compared  # noqa: E402
from reproduction.experiments import Scales, replay  # noqa: E402
from reproduction.preparation import PROSE, Prepared, Sizes  # noqa: E402
from reproduction.schedules import SCHEDULES, large_stages, small_stages  # noqa: E402
from reproduction.training import Condition, run_of  # noqa: E402

# The rule for conclusions.


def verdict(first, second):
    return compared("x", ("a", first), ("b", second), "bits").verdict


def test_a_difference_counts_only_where_its_interval_over_seeds_leaves_out_zero():
    assert verdict([1.0, 2.0, 3.0], [1.1, 2.1, 3.1]) == "below"
    assert verdict([1.1, 2.1, 3.1], [1.0, 2.0, 3.0]) == "above"
    assert verdict([1.0, 2.0, 3.0], [1.3, 2.1, 3.01]) == "undecided"  # the same sign in every seed is not enough
    assert verdict([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == "undecided"


def test_seeds_are_compared_in_pairs():
    found = compared("x", ("a", [1.0, 5.0, 9.0]), ("b", [1.5, 5.6, 9.4]), "bits").difference
    assert found.mean == pytest.approx(-0.5)
    assert found.interval == pytest.approx(4.303 * 0.1 / 3**0.5)


def test_numbers_without_noise_are_compared_as_they_are():
    assert [verdict([a], [2.0]) for a in (1.0, 2.0, 3.0)] == ["below", "undecided", "above"]


def test_only_a_verdict_against_a_verdict_is_a_change():
    before = {"a": "below", "b": "below", "c": "undecided", "d": "above"}
    now = {"a": "above", "b": "undecided", "c": "below", "d": "above", "new": "below"}
    turned, open_ones = changes(before, now)
    assert turned == ["a: was below, is above"]
    assert [sentence[0] for sentence in open_ones] == ["b", "c"]


# The schedules.


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_small_schedule_spends_its_tokens_and_gives_every_layer_a_turn(schedule):
    stages = small_stages(schedule, 64 * 1024, lr_scale=2.0, rows_scale=3.0, layers=6, step_tokens=1024)
    assert sum(stage.tokens for stage in stages) == pytest.approx(64 * 1024, abs=len(stages))
    for stage in stages:
        if stage.blocks is not None and stage.blocks.order == "cyclic":
            steps = stage.steps(4, 256)
            turns = [stage.blocks.active(list(range(6)), step, 0)[0] for step in range(steps)]
            assert min(turns.count(layer) for layer in range(6)) >= steps // 12


def test_rows_and_layers_have_learning_rate_factors_of_their_own():
    full, *_ = small_stages("full", 1024, lr_scale=2.0, rows_scale=3.0, layers=6, step_tokens=1024)
    assert (full.lr, full.embed_lr, full.head_lr) == pytest.approx((4e-5, 6e-4, 6e-4))
    rows, layers, *_ = small_stages("redwhale", 1024, lr_scale=2.0, rows_scale=3.0, layers=6, step_tokens=1024)
    assert (rows.lr, layers.lr) == pytest.approx((6e-4, 4e-5))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_large_schedules_shares_are_all_of_its_tokens(schedule):
    assert sum(share for _, share in large_stages(schedule)) == pytest.approx(1)


# The harness, on a model of some thousand weights.

TINY = Sizes(
    name="tiny",
    source_megabytes=1,
    added=(100, 200),
    trained_pieces=1_300,
    usual_added=100,
    tokens=1_024,
    sweep_tokens=0,
    seeds=(0, 1),
    sequence_length=64,
    batch_size=2,
    heldout_bytes=600,
    stories=2,
)


def write_zst(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes(zstandard.compress(lines.encode()))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    """A data folder in the shape of the real one, and an empty work folder."""
    root = tmp_path_factory.mktemp("reproduction")
    write_tiny_data(root)
    config = ModelConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    data = root / "real"
    save_model(model, data / "models" / "stories15m", extra_files=[root / "data" / "tokenizer.model"])
    korean, english = korean_texts(), english_texts()
    for number, name in enumerate(PROSE):
        write_zst(data / "korean" / "raw" / f"{name}.jsonl.zst", korean[4 + number :: 4])
        write_zst(data / "korean" / "heldout" / f"{name}.jsonl.zst", korean[number : number + 1])
    write_zst(data / "english" / "gutenberg.jsonl.zst", english[2:])
    (data / "english" / "wikitext2-valid.txt").write_text(english[0], encoding="utf-8")
    return Prepared(root / "work", data, TINY)


def test_a_finished_run_is_found_again_and_another_seed_is_another_run(prepared):
    condition = Condition(tokens=1_024, lr_scale=1.0, rows_scale=1.0, added=100, curve=(1,))
    first = run_of(prepared, condition, 0)
    files = {path: path.stat().st_mtime_ns for path in (prepared.root / "runs").iterdir()}
    assert run_of(prepared, condition, 0) == first
    assert {path: path.stat().st_mtime_ns for path in (prepared.root / "runs").iterdir()} == files
    other = run_of(prepared, condition, 1)
    assert other["before"] == first["before"]
    assert other["after"]["korean"]["loss"] != first["after"]["korean"]["loss"]
    assert [stage["name"] for stage in first["stages"]] == ["embed+head", "odd-layers", "even-layers", "lora"]
    assert [step for step, _ in first["curve"]] == [1]
    assert set(first["after"]) == {"korean", "wikipedia", "stories"}
    assert not list(prepared.root.glob("tmp*"))


def test_embedding_and_head_are_two_matrices_and_every_size_is_part_of_the_next(prepared):
    small, large = (prepared.tokenizer(added) for added in TINY.added)
    pieces = [[tokenizer.processor.id_to_piece(i) for i in range(tokenizer.vocab_size)] for tokenizer in (small, large)]
    assert set(pieces[0]) < set(pieces[1])
    config = json.loads((prepared.initial(100, "decomposition", 0) / "config.json").read_text(encoding="utf-8"))
    assert (config["tie_word_embeddings"], config["vocab_size"]) == (False, 700)


def test_replay_compares_every_share_with_none_in_all_domains(prepared, monkeypatch):
    monkeypatch.setattr("reproduction.experiments.ENGLISH", (0.0, 0.5))
    result = replay(prepared, Scales(1.0, dict.fromkeys(SCHEDULES, 1.0)))
    assert {one["name"].split(":")[0] for one in result["comparisons"]} == {
        f"replay, {domain}" for domain in ("korean", "wikipedia", "stories")
    }
    for one in result["comparisons"]:
        key = one["metric"]
        values = [result["conditions"][share][key]["values"] for share in ("50%", "0%")]
        assert one["difference"]["values"] == pytest.approx([a - b for a, b in zip(*values, strict=True)])
    assert msgspec.json.encode(result)


# The page.


def test_the_pages_tables_are_made_of_the_results():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_tables(text) == text
    assert set(re.findall(r"<!-- table ([\w-]+) -->", text)) == set(page.TABLES)


def test_the_command_names_the_experiments_that_there_are(tmp_path):
    script = BENCH / "reproduction" / "run.py"
    done = subprocess.run(
        [sys.executable, script, "--data", tmp_path, "--work", tmp_path, "nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "there is no experiment 'nonsense'; known: token_ratio, learning_rates" in done.stderr

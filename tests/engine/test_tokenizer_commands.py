import json
from pathlib import Path

import pytest
from tiny import TINY

from redwhale.engine.cli import main
from redwhale.model import create_checkpoint, read_config
from redwhale.tokenizer import Tokenizer

WORDS = ["할머니께서", "도서관은", "김치찌개를", "국회는", "선생님이", "영화가", "의결했다", "끓였습니다", "재미있었다"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "news.jsonl"
    rows = [
        {"id": f"{i}{j}", "text": f"{a} {b} {c}."}
        for i, a in enumerate(WORDS)
        for j, b in enumerate(WORDS)
        for c in WORDS
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base() -> Path:
    path = Path(__file__).parents[2].parent / "shared/data/tokenizers/mistral-v1.model"
    if not path.exists():
        pytest.skip("no real Mistral tokenizer beside the checkout")
    return path


@pytest.fixture(scope="module")
def built(corpus, base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "hybrid"
    arguments = ["tokenizer", "build", str(base), str(folder), "--corpus", f"news={corpus}", "--text", f"news={corpus}"]
    assert main([*arguments, "vocab_size=310", "max_added=20", "character_coverage=1.0"]) == 0
    return folder


def test_build_writes_a_tokenizer_that_check_accepts(built, base, capsys):
    assert Tokenizer(built / "tokenizer.model").vocab_size == 32_020
    assert json.loads((built / "summary.json").read_text())["training_characters"].keys() == {"news"}
    assert main(["tokenizer", "check", str(built), "--base", str(base), "--fuzz", "200"]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_check_of_a_wrong_tokenizer_exits_with_2(built, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_bytes((built / "tokenizer.json").read_bytes())
    base = Path(__file__).parents[2].parent / "shared/data/tokenizers/llama2.model"
    (tmp_path / "tokenizer.model").write_bytes(base.read_bytes())
    assert main(["tokenizer", "check", str(tmp_path), "--fuzz", "200"]) == 2
    out, err = capsys.readouterr()
    assert "FAIL  tokenizer.json gives the ids of the .model" in out
    assert "proofs: tokenizer.json gives the ids of the .model" in err


def test_report_tells_ratio_growth_and_flops(built, base, corpus, tmp_path, capsys):
    arguments = ["tokenizer", "report", str(base), str(built), "--text", f"news={corpus}"]
    assert main([*arguments, "--preset", "mistral-7b-v0.1", "--json", str(tmp_path / "r.json")]) == 0
    row = json.loads((tmp_path / "r.json").read_text())["tokenizers"][1]
    assert row["cost"]["parameter_growth"] == 2 * 20 * 4096
    assert row["cost"]["flops_saved_share"] == pytest.approx(1 - row["mean_ratio"], abs=0.001)
    assert "+163,840 parameters" in capsys.readouterr().out


def test_sweep_writes_table_and_plot(base, corpus, tmp_path):
    arguments = ["tokenizer", "sweep", str(base), str(tmp_path / "s"), "--corpus", str(corpus), "--text", f"n={corpus}"]
    assert main([*arguments, "--sizes", "10,15,20", "vocab_size=310", "character_coverage=1.0"]) == 0
    assert [row["added"] for row in json.loads((tmp_path / "s/sweep.json").read_text())["sizes"]] == [10, 15, 20]
    assert (tmp_path / "s/sweep.png").stat().st_size > 1000


def test_prune_writes_a_smaller_checkpoint_with_its_tokenizer(base, corpus, tmp_path):
    from dataclasses import replace

    import torch

    create_checkpoint(replace(TINY, vocab_size=32_000), tmp_path / "base", seed=0, dtype=torch.float32)
    (tmp_path / "base/tokenizer.model").write_bytes(base.read_bytes())
    arguments = ["tokenizer", "prune", str(tmp_path / "base"), str(tmp_path / "small"), "--text", f"news={corpus}"]
    assert main(arguments) == 0
    small = Tokenizer(tmp_path / "small/tokenizer.model")
    assert read_config(tmp_path / "small").vocab_size == small.vocab_size < 10_000
    old_ids = json.loads((tmp_path / "small/old_ids.json").read_text())
    text = f"{WORDS[0]} {WORDS[3]}"
    assert [old_ids[i] for i in small.encode(text)] == Tokenizer(base).encode(text)


def corpus_of(tmp_path, text):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"id": "1", "text": text}, ensure_ascii=False), encoding="utf-8")
    return path


def test_wrong_inputs_are_one_sentence_and_exit_code_2(base, tmp_path, capsys):
    (tmp_path / "not.model").write_bytes(b"hello world")
    small, empty = corpus_of(tmp_path, "할머니께서 끓였습니다 " * 5), tmp_path / "english.jsonl"
    empty.write_text('{"id": "1", "text": "English only"}', encoding="utf-8")
    for arguments, sentence in [
        ([str(base), "o", "--corpus", str(empty)], "training corpus holds no Korean text"),
        ([str(base), "o", "--corpus", str(small)], "vocab_size 40000 is too large for this corpus; use at most"),
        ([str(tmp_path / "not.model"), "o", "--corpus", str(small)], "is not a SentencePiece model"),
        ([str(base), "o", "--corpus", str(small), "vocab=3"], "unknown field `vocab`"),
        ([str(base), "o", "--corpus", str(small), "--text", "nowhere"], "does not name its domain"),
    ]:
        assert main(["tokenizer", "build", *arguments]) == 2
        assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("o").exists()

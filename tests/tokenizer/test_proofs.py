import sys

import msgspec
import pytest

from redwhale.tokenizer import TokenizerConfig, TokenizerError, check_tokenizer, open_encoder
from redwhale.tokenizer.export import require_exportable, tokenizer_json
from redwhale.tokenizer.proofs import proof_lines
from redwhale.tokenizer.report import compare
from redwhale.tokenizer.sweep import knee, sweep_sizes


def failed(report):
    return [check.name for check in report.checks if check.failed]


def test_every_proof_of_the_hybrid_holds(exported, base_path, english_lines):
    report = check_tokenizer(exported, base=base_path, english=english_lines, fuzz=2000)
    assert failed(report) == []
    assert not report.failed
    made = [check.name.split()[0] for check in report.checks if "llama.cpp" not in check.name]
    assert made == [
        *("every", "decode(encode(text))", "lone", "tokenizer.json", "transformers'", "the", "the", "English"),
    ]
    assert all(check.checked > 2 for check in report.checks)
    assert "FAIL" not in proof_lines(report)


@pytest.fixture
def score_zero(hybrid, base, tmp_path):
    """The hybrid as Chinese-LLaMA would append it."""
    tied = type(hybrid).FromString(hybrid.SerializeToString())
    for piece in list(tied.pieces)[len(base.pieces) :]:
        piece.score = 0.0
    (tmp_path / "tokenizer.model").write_bytes(tied.SerializeToString())
    (tmp_path / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer_json(tied)))
    return tmp_path


def test_proofs_find_a_merge_with_score_zero(score_zero, korean_texts):
    words = ["".join(pair) for pair in zip(korean_texts, reversed(korean_texts), strict=True)]
    assert "tokenizer.json gives the ids of the .model" in failed(check_tokenizer(score_zero, texts=words))


def test_scores_counted_down_from_the_whitespace_runs_collide_and_are_refused(hybrid, base):
    """Float32 cannot tell −1e9 − 1 from −1e9 − 2: appended below the lowest score of all, pieces would be tied."""
    low = type(hybrid).FromString(hybrid.SerializeToString())
    for i, piece in enumerate(list(low.pieces)[len(base.pieces) :]):
        piece.score = -1e9 - 1 - i
    with pytest.raises(TokenizerError, match="share the score -1e\\+09"):
        require_exportable(low)
    require_exportable(hybrid)


def test_proofs_find_moved_ids(exported, hybrid, base_path, tmp_path):
    moved = type(hybrid).FromString(hybrid.SerializeToString())
    moved.pieces[300].piece, moved.pieces[301].piece = moved.pieces[301].piece, moved.pieces[300].piece
    (tmp_path / "tokenizer.model").write_bytes(moved.SerializeToString())
    assert "the base's pieces keep their ids" in failed(check_tokenizer(tmp_path, base=base_path, fuzz=100))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="has neither tokenizer.model nor tokenizer.json"):
        check_tokenizer(tmp_path)


def test_lone_models_are_checked_and_say_what_was_skipped(base_path):
    report = check_tokenizer(base_path, fuzz=100)
    assert report.skipped["tokenizer.json"] == "there is none beside the model"


def test_byte_share_and_unused_pieces_are_counted(exported, base_path, korean_texts):
    base, hybrid = open_encoder(base_path), open_encoder(exported)
    row = compare("hybrid", base, hybrid, {"korean": korean_texts[:3]})
    counted = [i for text in korean_texts[:3] for i in base.encode(text)]
    assert row.domains[0].base_byte_share == pytest.approx(sum(3 <= i < 259 for i in counted) / len(counted))
    used = {i for text in korean_texts[:3] for i in hybrid.encode(text)}
    assert row.never_used == row.new_pieces - sum(i >= base.vocab_size for i in used) > 0
    assert row.mean_ratio == row.domains[0].ratio


def test_sweep_falls_and_each_size_is_a_part_of_the_next(base_path, korean_texts):
    config = TokenizerConfig(vocab_size=700, character_coverage=1.0, threads=1)
    documents = (("", text) for text in korean_texts)
    rows = sweep_sizes(documents, base_path, config, [150, 200, 300], {"korean": korean_texts})
    assert [row.added for row in rows] == [150, 200, 300]
    assert rows[0].mean_ratio > rows[1].mean_ratio > rows[2].mean_ratio
    with pytest.raises(TokenizerError, match="9999 pieces are more than the .* candidates; raise vocab_size"):
        sweep_sizes((("", t) for t in korean_texts), base_path, config, [9999], {"korean": korean_texts})


def test_knee_is_where_the_curve_bends_most():
    assert knee([1, 2, 3, 4, 5], [1.0, 0.5, 0.4, 0.35, 0.3]) == 2
    assert knee([1, 2], [1.0, 0.5]) == 2


def test_llama_cpp_gives_the_same_ids(exported):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    check = next(c for c in check_tokenizer(exported, fuzz=500).checks if c.name == "llama.cpp gives the same ids")
    assert (check.failed, check.examples) == (0, [])
    assert check.checked > 3000


def test_a_proof_whose_package_is_missing_is_skipped_by_name(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert check_tokenizer(exported, fuzz=10).skipped == {"llama.cpp": "llama_cpp is not installed"}

import sys

import msgspec
import pytest

from redwhale.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    TokenizerError,
    build_hybrid_tokenizer,
    load_model_proto,
    open_encoder,
    token_ratio,
)
from redwhale.tokenizer.proofs import count_parity

CONFIG = TokenizerConfig(vocab_size=700, max_added=300, character_coverage=1.0, threads=1)


def sourced(texts):
    return (("made", text) for text in texts)


@pytest.fixture(scope="module")
def built(korean_texts, base_path, english_lines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    domains = {"sentences": korean_texts[::7], "mixed": ["국회는 Act 3를 의결했다 <s>", "새 낱말"]}
    summary = build_hybrid_tokenizer(
        sourced(korean_texts),
        base_path,
        folder,
        CONFIG,
        domains=domains,
        english_sample=[*english_lines[:300], "우리 the"],
    )
    return folder, domains, summary


def test_summary_counts_what_was_built(built, base_path, base, english_lines):
    folder, _, summary = built
    hybrid = load_model_proto(folder / "tokenizer.model")
    assert summary.base_pieces == len(base.pieces)
    assert summary.added == 300 == len(hybrid.pieces) - len(base.pieces)
    assert summary.vocab_size == len(hybrid.pieces)
    assert summary.candidates > 304
    assert summary.reserved == 0
    assert summary.training_characters.keys() == {"made"}
    assert summary.dropped_unreachable == []
    assert summary.sha256 == Tokenizer(folder / "tokenizer.model").sha256
    assert summary.english_lines == 301
    assert summary.english_changes == ["우리 the"]
    assert summary.parity_mismatches == 0
    specials = sum(any(s in line for s in ("<s>", "</s>", "<unk>")) for line in english_lines[:300])
    assert summary.parity_texts == 301 + len(built[1]["sentences"]) + 2 - 1 - specials
    assert msgspec.json.decode(msgspec.json.encode(summary), type=type(summary)) == summary


def test_ratio_is_measured_per_domain(built, base_path):
    folder, domains, summary = built
    base, hybrid = Tokenizer(base_path), Tokenizer(folder / "tokenizer.model")
    assert [row.domain for row in summary.domains] == ["sentences", "mixed"]
    for row, texts in zip(summary.domains, domains.values(), strict=True):
        base_tokens = sum(len(base.encode(text)) for text in texts)
        hybrid_tokens = sum(len(hybrid.encode(text)) for text in texts)
        words = sum(len(text.split()) for text in texts)
        assert (row.base_tokens, row.hybrid_tokens, row.documents) == (base_tokens, hybrid_tokens, len(texts))
        assert row.characters == len("".join(texts))
        assert row.bytes == len("".join(texts).encode())
        assert row.ratio == pytest.approx(hybrid_tokens / base_tokens)
        assert row.base_chars_per_token == pytest.approx(row.characters / base_tokens)
        assert row.hybrid_chars_per_token == pytest.approx(row.characters / hybrid_tokens)
        assert row.base_tokens_per_eojeol == pytest.approx(base_tokens / words)
        assert row.hybrid_tokens_per_eojeol == pytest.approx(hybrid_tokens / words)
    assert summary.domains[0].ratio < 0.3


def test_building_twice_writes_the_same_files(built, korean_texts, base_path, tmp_path):
    folder, domains, _ = built
    build_hybrid_tokenizer(sourced(korean_texts), base_path, tmp_path, CONFIG, domains=domains)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_parity_is_null_without_tokenizers_and_counts_what_differs(built, tmp_path, base_path, monkeypatch):
    folder, _, _ = built
    hybrid = open_encoder(folder / "tokenizer.model")
    exported = folder / "tokenizer.json"
    assert count_parity(open_encoder(base_path), exported, ["the", "우리는", "a<s>"]) == (2, 1)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert count_parity(hybrid, exported, ["the"]) is None


def test_corpus_without_new_hangul_is_refused(english_lines, base_path, tmp_path):
    with pytest.raises(TokenizerError, match="training corpus holds no Korean text; check the files"):
        build_hybrid_tokenizer(sourced(english_lines[:2000]), base_path, tmp_path / "out", CONFIG, domains={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_domain_without_words_is_refused(exported, texts):
    tokenizer = open_encoder(exported)
    with pytest.raises(TokenizerError, match="the domain 'news' holds no words; give it text or leave it out"):
        token_ratio(tokenizer, tokenizer, {"news": texts})


def test_domain_that_is_one_string_is_refused(exported):
    tokenizer = open_encoder(exported)
    with pytest.raises(TokenizerError, match=r"the domain 'news' is one string.*pass \[text\]"):
        token_ratio(tokenizer, tokenizer, {"news": "한국어"})


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be positive"),
        ({"balance": 2.0}, "balance is 2.0; it must lie between 0 and 1"),
        ({"min_frequency": -1}, "min_frequency is -1; give 0 or more"),
        ({"max_added": -1}, "max_added is -1; give a positive number, or 0 for no limit"),
        ({"max_training_bytes": -5}, "max_training_bytes is -5; give a positive number, or 0 for no limit"),
        ({"character_coverage": 1.5}, "character_coverage is 1.5; it must lie between 0.9 and 1"),
        ({"threads": -1}, "threads is -1; give a number of threads, or 0 for every core"),
    ],
)
def test_bad_setting_is_refused(setting, sentence):
    with pytest.raises(TokenizerError, match=sentence):
        TokenizerConfig(**setting)
    with pytest.raises(msgspec.ValidationError, match=sentence):
        msgspec.convert(setting, TokenizerConfig)

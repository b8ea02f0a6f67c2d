"""Chunks give SentencePiece's ids, one for one, or the text stays whole."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from redwhale.filtering import read_documents
from redwhale.tokenizer import Tokenizer, TokenizerError, chunked_encoder
from redwhale.tokenizer.chunked_encoder import ChunkedEncoder, splits_at_words

SHARED = Path(__file__).parents[2].parent / "shared/data"

# Everything that words are cut at or normalised, between letters that merge.
BLANKS = st.sampled_from([*" \n\t\r\0▁", "  ", "\n\n", "\r\n", "\u3000", "\u00a0"])
LATIN = st.sampled_from([*"aTheq.,0189(<s>", "the ", " of"])
KOREAN = st.sampled_from(
    [*"가한국어는을다", "김치", "습니다.", "ㄱ", "\u1112\u1161\u11ab", "가\u11a8", "漢", "👩\u200d🔬"]
)
TEXTS = st.lists(BLANKS | LATIN | KOREAN | st.characters(exclude_categories=["Cs"]), max_size=40).map("".join)


def written(proto, folder) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return ChunkedEncoder(tokenizer)


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_ids_of_any_text_are_sentencepieces_wherever_it_is_cut(encoder, chunk, text):
    assert encoder.cuts
    before = chunked_encoder._CHUNK
    chunked_encoder._CHUNK = chunk
    try:
        assert encoder.encode(text).tolist() == encoder.tokenizer.encode(text)
    finally:
        chunked_encoder._CHUNK = before


@settings(max_examples=30, deadline=None)
@given(text=TEXTS.map(lambda text: text * 40))
def test_ids_of_long_texts_are_sentencepieces(encoder, text):
    assert encoder.encode(text).tolist() == encoder.tokenizer.encode(text)


@pytest.mark.parametrize(
    "text", ["", " ", "  ", "\n", "▁", "▁ a", "a▁ b", "a", " a", "a ", "a \n b", "  a" * 3, " " * 9]
)
@pytest.mark.parametrize("chunk", [1, 2])
def test_texts_of_edges_alone(encoder, text, chunk, monkeypatch):
    monkeypatch.setattr(chunked_encoder, "_CHUNK", chunk)
    assert encoder.encode(text).tolist() == encoder.tokenizer.encode(text)


def test_a_long_text_is_cut_into_chunks_that_begin_at_words(monkeypatch):
    monkeypatch.setattr(chunked_encoder, "_CHUNK", 4)
    assert list(chunked_encoder._chunks(" ab cd ef  gh▁ ij")) == [" ab cd", " ef  gh▁ ij"]
    assert list(chunked_encoder._chunks(" abcdefgh")) == [" abcdefgh"]


def test_a_long_text_without_a_space(encoder):
    text = "한국어김치찌개" * 3000
    assert encoder.encode(text).tolist() == encoder.tokenizer.encode(text)


@pytest.mark.parametrize("repeat", [1, 1000])
def test_a_lone_surrogate_is_refused_as_the_tokenizer_does(encoder, repeat):
    with pytest.raises(TokenizerError, match="lone surrogate"):
        encoder.encode("words " * repeat + "\ud800")


def test_ids_take_two_bytes_while_the_vocabulary_fits(encoder):
    assert encoder.encode("a").dtype == np.uint16


@pytest.mark.parametrize(
    "pieces",
    [[("▁", -1), ("a", -2), ("a▁", -0.5)], [("▁a", -1), ("▁", -2), ("a", -2), ("▁a▁a", -0.1), ("▁a▁", -0.2)]],
    ids=["a word's end joined to the next ▁", "▁ inside"],
)
def test_pieces_across_words_keep_the_text_whole(make_proto, tmp_path, pieces):
    proto = make_proto(pieces)
    tokenizer = written(proto, tmp_path)
    assert not splits_at_words(proto)
    text = " ".join("a" * 2000)
    assert ChunkedEncoder(tokenizer).encode(text).tolist() == tokenizer.encode(text)


def test_the_leftmost_of_equal_scores_wins_inside_a_word_as_in_the_whole_text(make_proto, tmp_path, monkeypatch):
    tokenizer = written(make_proto([("▁", -9), ("a", -9), ("aa", -1), ("aaa", -1), ("▁a", -1)]), tmp_path)
    encoder = ChunkedEncoder(tokenizer)
    assert encoder.cuts
    monkeypatch.setattr(chunked_encoder, "_CHUNK", 1)
    for count in range(1, 9):
        text = " ".join(["a" * count] * 3)
        assert encoder.encode(text).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"user_defined_symbols": ["<chat>"]},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False},
    ],
    ids=str,
)
def test_models_of_other_kinds_are_encoded_by_sentencepiece(tmp_path, english_lines, options):
    model = io.BytesIO()
    usual = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english_lines[:400]),
        model_writer=model,
        vocab_size=500,
        minloglevel=2,
        **{**usual, "byte_fallback": True, "hard_vocab_limit": False, **options},
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    encoder = ChunkedEncoder(tokenizer)
    assert not encoder.cuts
    for text in ["the  <chat> of\nthe end " * 100, " a ½ ㎏" * 300, "", *english_lines[:20]]:
        assert encoder.encode(text).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    "path", ["korean/heldout/reviews.jsonl.zst", "korean/heldout/court.jsonl.zst", "english/wikitext2-test.txt"]
)
def test_real_text_with_real_tokenizers(real_base_path, path):
    if not (SHARED / path).exists():
        pytest.skip("no real text beside the checkout")
    tokenizer = Tokenizer(real_base_path)
    encoder = ChunkedEncoder(tokenizer)
    assert encoder.cuts
    for _, document in zip(range(300), read_documents(SHARED / path), strict=False):
        text = document.text[:50_000]
        assert encoder.encode(text).tolist() == tokenizer.encode(text)

import io
import re
import sys
import unicodedata

import pytest
import sentencepiece

from redwhale.tokenizer import ModelProto, TokenizerError, train_korean_bpe, train_pieces
from redwhale.tokenizer.train import ksx1001_syllables, split_morphemes


def test_two_trainings_give_the_same_bytes(korean_texts, base, trained):
    same = train_korean_bpe(korean_texts, base, vocab_size=800, character_coverage=1.0, num_threads=2)
    assert same.SerializeToString(deterministic=True) == trained.SerializeToString(deterministic=True)


def test_pieces_do_not_depend_on_the_number_of_threads(korean_texts, base, trained):
    single = train_korean_bpe(korean_texts, base, vocab_size=800, character_coverage=1.0, num_threads=1)
    assert pieces(single) == pieces(trained)


def pieces(proto):
    return [(piece.piece, piece.score, piece.type) for piece in proto.pieces]


def test_training_takes_the_rules_of_the_base(base, trained):
    for field in ("split_digits", "byte_fallback", "split_by_unicode_script", "split_by_number", "split_by_whitespace"):
        assert getattr(trained.trainer_spec, field) == getattr(base.trainer_spec, field)
    assert len(trained.pieces) == 800
    assert trained.normalizer_spec.name == "identity"


def test_training_learns_frequent_words_first(trained):
    merged = [piece.piece for piece in trained.pieces if piece.type == 1 and len(piece.piece) > 2]
    assert "▁도서관은" in merged
    assert merged.index("습니다") < merged.index("▁도서관은")  # 240 occurrences against 80


def test_decomposed_corpus_trains_the_same_pieces(korean_texts, base, trained):
    decomposed = [unicodedata.normalize("NFD", text) for text in korean_texts]
    again = train_korean_bpe(decomposed, base, vocab_size=800, character_coverage=1.0, num_threads=2)
    assert pieces(again) == pieces(trained)


def test_words_with_frequencies_train_the_pieces_of_the_text_itself(korean_texts, base, trained):
    """Against SentencePiece on the same sentences, with a dummy prefix as in the base."""
    model = io.BytesIO()
    hangul = [re.sub("[^가-힣 ]", "", text) for text in korean_texts]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(hangul),
        model_writer=model,
        model_type="bpe",
        vocab_size=800,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        minloglevel=2,
    )
    theirs = [piece.piece for piece in ModelProto.FromString(model.getvalue()).pieces]
    # A lone ▁ counts as a character there: our words have it only in front.
    assert [piece.piece for piece in trained.pieces] == theirs


def test_long_lines_train_the_same_pieces(korean_texts, base, trained):
    one_line = train_korean_bpe([" ".join(korean_texts)], base, vocab_size=800, character_coverage=1.0, num_threads=1)
    assert pieces(one_line) == pieces(trained)


def test_unigram_pieces_and_required_characters(korean_texts, base):
    words = {"▁도서관은": 40.0, "▁도서관에": 40.0, "할머니께서": 30.0, "어머니께서": 30.0, "아버지께서": 30.0}
    unigram = train_pieces(words, base, vocab_size=279, algorithm="unigram", required_characters="뷁쀍", num_threads=1)
    names = {piece.piece for piece in unigram.pieces}
    assert unigram.trainer_spec.model_type == 1
    assert {"뷁", "쀍", "도", "께서"} <= names


def test_ksx1001_has_its_2350_syllables():
    syllables = ksx1001_syllables()
    assert len(syllables) == 2350
    assert syllables[0] == "가"
    assert syllables[-1] == "힝"  # 0xC8FE
    assert "뷁" not in syllables
    assert "똠" not in syllables


def test_morphemes_are_cut_where_they_do_not_share_a_syllable():
    pytest.importorskip("kiwipiepy", reason="kiwipiepy is an optional extra")
    cut = split_morphemes({"▁도서관은": 3.0, "▁했다": 2.0, "학교에서": 1.0})
    assert cut["▁도서관"] == 3.0
    assert cut["은"] == 3.0
    assert cut["학교"] == cut["에서"] == 1.0
    assert "▁했" in cut  # 하 and 었 share it
    assert sum(len(word) * count for word, count in cut.items()) == 3 * 5 + 2 * 3 + 4


def test_morphemes_without_kiwipiepy_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "kiwipiepy", None)
    with pytest.raises(TokenizerError, match=r"need kiwipiepy; pip install \"redwhale\[morphemes\]\""):
        split_morphemes({"▁도서관은": 3.0})


def test_words_longer_than_the_trainer_can_index_do_not_stop_it(korean_texts, base):
    train_korean_bpe([*korean_texts, "가나다라" * 20_000], base, vocab_size=600, num_threads=1)


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_empty_corpus_is_refused(base, texts):
    with pytest.raises(TokenizerError, match="the tokenizer's training corpus holds no Korean text; check the files"):
        train_korean_bpe(texts, base, vocab_size=800)


def test_too_large_vocabulary_is_refused_with_the_largest_possible(korean_texts, base):
    with pytest.raises(TokenizerError, match="vocab_size 9000 is too large for this corpus; use at most") as refusal:
        train_korean_bpe(korean_texts, base, vocab_size=9000, num_threads=1)
    largest = int(str(refusal.value).split("at most ")[1].split(",")[0])
    assert len(train_korean_bpe(korean_texts, base, vocab_size=largest, num_threads=1).pieces) == largest


def test_too_small_vocabulary_is_refused_with_the_smallest_possible(korean_texts, base):
    with pytest.raises(TokenizerError, match="vocab_size 270 cannot hold the characters of this corpus") as refusal:
        train_korean_bpe(korean_texts, base, vocab_size=270, num_threads=1)
    smallest = int(str(refusal.value).split("at least ")[1].split(",")[0])
    assert len(train_korean_bpe(korean_texts, base, vocab_size=smallest, num_threads=1).pieces) == smallest


def test_one_string_is_refused(base):
    with pytest.raises(TokenizerError, match=r"texts is one string, not a collection of documents; pass \[text\]"):
        train_korean_bpe("한국어", base, vocab_size=800)


def test_training_is_quiet(korean_texts, base, capfd):
    train_korean_bpe(korean_texts, base, vocab_size=500, num_threads=1)
    assert capfd.readouterr() == ("", "")

import random
import unicodedata

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from redwhale.tokenizer import TokenizerError, hangul_pieces, sample_texts, train_korean_bpe
from redwhale.tokenizer.train import MAX_SENTENCE_BYTES, _sentences


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
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.SerializeToString())
    assert processor.normalize("  Ａ  한") == "▁▁▁Ａ▁▁한"  # full width and spaces stay


def test_training_learns_frequent_words_first(trained):
    merged = [piece for piece in hangul_pieces(trained) if len(piece) > 2]
    assert "▁도서관은" in merged
    assert merged.index("습니다") < merged.index("▁도서관은")  # 240 occurrences against 80


def test_decomposed_corpus_trains_the_same_pieces(korean_texts, base, trained):
    decomposed = [unicodedata.normalize("NFD", text) for text in korean_texts]
    again = train_korean_bpe(decomposed, base, vocab_size=800, character_coverage=1.0, num_threads=2)
    assert pieces(again) == pieces(trained)


def test_line_breaks_and_long_lines_train_the_same_pieces(korean_texts, base, trained):
    one_line = train_korean_bpe([" ".join(korean_texts)], base, vocab_size=800, character_coverage=1.0, num_threads=1)
    assert pieces(one_line) == pieces(trained)
    lines = train_korean_bpe(["\r\n\n".join(korean_texts)], base, vocab_size=800, character_coverage=1.0)
    assert pieces(lines) == pieces(trained)


@given(st.lists(st.text(st.sampled_from("가a \n🐳\0\ud800"), max_size=20).map(lambda s: s * 500), max_size=3))
def test_cut_lines_are_short_and_lose_only_whitespace(texts):
    cut = list(_sentences(texts))
    assert all(0 < len(line) <= MAX_SENTENCE_BYTES for line in cut)
    expected = "".join(texts).replace("\0", "").replace("\ud800", "?")
    assert "".join("".join(line.decode().split()) for line in cut) == "".join(expected.split())


def test_words_longer_than_the_trainer_can_index_do_not_stop_it(korean_texts, base):
    train_korean_bpe([*korean_texts, "가나다라" * 20_000], base, vocab_size=600, num_threads=1)


def test_sample_does_not_depend_on_order_and_fills_its_limit():
    rng = random.Random(0)
    texts = [f"{i} " + "가" * rng.randint(0, 400) for i in range(500)]
    total = sum(len(text.encode()) for text in texts)
    sample = sample_texts(texts, total // 5, seed=1)
    assert total // 5 - 2 <= sum(len(text.encode()) for text in sample) <= total // 5
    assert set(sample[:-1]) < set(texts)
    rng.shuffle(texts)
    assert sample_texts(iter(texts), total // 5, seed=1) == sample
    assert sample_texts(texts, total // 5, seed=2) != sample
    assert sorted(sample_texts(texts, total, seed=1)) == sorted(texts)


def test_sample_is_uniform():
    counts = [0] * 20
    for seed in range(2000):
        for text in sample_texts([f"{i:02d}" for i in range(20)], 10, seed):
            counts[int(text)] += 1
    # 5 of 20 texts are kept: binomial(2000, 1/4) has a standard deviation of 19.4.
    assert sum(counts) == 10_000
    assert max(abs(count - 500) for count in counts) < 5 * 19.4


def test_sample_of_one_huge_document_is_cut_between_characters():
    assert sample_texts(["가나다라"], 8, seed=0) == ["가나"]


def test_training_on_a_sample_is_repeatable(korean_texts, base, trained):
    def train(texts, seed):
        return pieces(train_korean_bpe(texts, base, vocab_size=500, num_threads=2, max_bytes=15_000, seed=seed))

    assert train(korean_texts, 1) == train(korean_texts[::-1], 1) != train(korean_texts, 2)


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_empty_corpus_is_refused(base, texts):
    with pytest.raises(TokenizerError, match="the tokenizer's training corpus holds no text; check the files"):
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


def test_one_string_and_no_bytes_are_refused(base):
    with pytest.raises(TokenizerError, match=r"texts is one string, not a collection of documents; pass \[text\]"):
        train_korean_bpe("한국어", base, vocab_size=800)
    with pytest.raises(TokenizerError, match="max_bytes is 0; give a positive number of bytes"):
        train_korean_bpe(["한국어"], base, vocab_size=800, max_bytes=0)


def test_training_is_quiet(korean_texts, base, capfd):
    train_korean_bpe(korean_texts, base, vocab_size=500, num_threads=1)
    assert capfd.readouterr() == ("", "")

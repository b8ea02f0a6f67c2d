import itertools
import random
import unicodedata

import numpy as np
import pytest
import sentencepiece

from redwhale.tokenizer import (
    Tokenizer,
    TokenizerError,
    load_model_proto,
    merge_pieces,
    merge_reachable,
    script_pieces,
    unreachable_pieces,
)


def test_selected_pieces_are_new_hangul_in_training_order(trained, base):
    known = {piece.piece for piece in base.pieces}
    selected = script_pieces(trained, base)
    expected = []
    for piece in trained.pieces:
        syllables = piece.piece.removeprefix("▁")
        if syllables and all("HANGUL SYLLABLE" in hangul_name(c) for c in syllables) and piece.piece not in known:
            expected.append(piece.piece)
    assert selected == expected
    assert {"가", "한", "국", "어"} <= known & {piece.piece for piece in trained.pieces}
    assert len(selected) > 300


def hangul_name(character):
    return unicodedata.name(character, "")


def test_base_ids_and_scores_are_unchanged(base, hybrid):
    assert list(hybrid.pieces[: len(base.pieces)]) == list(base.pieces)
    assert hybrid.trainer_spec.vocab_size == len(hybrid.pieces) > len(base.pieces) + 300
    assert hybrid.normalizer_spec == base.normalizer_spec


def test_new_scores_fall_strictly_below_the_base(base, hybrid):
    new = np.array([piece.score for piece in hybrid.pieces[len(base.pieces) :]], dtype=np.float32)
    lowest = min(piece.score for piece in base.pieces if piece.type == 1 and set(piece.piece) != {"▁"})
    assert (np.diff(new) < 0).all()
    assert new[0] < lowest
    assert new[-1] > -1e9  # whitespace runs stay last


@pytest.mark.parametrize("lowest", [-3.0, -(2.0**24), -3e9])
def test_scores_stay_distinct_in_float32(make_proto, lowest):
    base = make_proto([("가", -1.0), ("나", lowest), ("▁", -1e9)])
    pieces = ["".join(p) for n in (2, 3, 4) for p in itertools.product("가나", repeat=n)]
    merged = merge_pieces(base, pieces)
    scores = np.array([piece.score for piece in merged.pieces[261 + 1 :]], dtype=np.float32)
    assert len(np.unique(scores)) == len(pieces)
    assert (np.diff(scores) < 0).all()
    assert scores[0] < np.float32(lowest)


def random_model(make_proto, seed):
    rng = random.Random(seed)
    letters = "abc"
    pieces = {"".join(rng.choices(letters, k=rng.randint(2, 4))) for _ in range(12)}
    ordered = rng.sample(sorted(pieces), len(pieces)) + list(letters)
    return make_proto([(piece, -1.0 - i) for i, piece in enumerate(ordered)])


@pytest.mark.parametrize("seed", range(12))
def test_unreachable_pieces_equal_those_no_text_ever_produces(make_proto, seed):
    proto = random_model(make_proto, seed)
    proto.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = ["".join(text) for length in range(1, 8) for text in itertools.product("abc", repeat=length)]
    produced = {i for ids in processor.encode(texts) for i in ids}
    everything = range(259, len(proto.pieces))
    assert unreachable_pieces(proto, everything) == [i for i in everything if i not in produced]


def test_the_random_models_have_unreachable_pieces(make_proto):
    models = [random_model(make_proto, seed) for seed in range(12)]
    assert sum(len(unreachable_pieces(model, range(len(model.pieces)))) for model in models) > 12


def test_score_zero_makes_a_base_piece_unreachable_and_a_low_score_does_not(make_proto):
    base = make_proto([("bc", -1.0), ("bcd", -2.0), ("abcd", -3.0), *((c, -4.0 - i) for i, c in enumerate("abcd"))])
    everything = range(len(base.pieces) + 1)
    merged = merge_pieces(base, ["ab"])
    assert unreachable_pieces(merged, everything) == []
    merged.pieces[-1].score = 0  # as Chinese-LLaMA appends
    assert unreachable_pieces(merged, everything) == [261]


def test_specials_and_bytes_are_not_called_unreachable(base):
    assert unreachable_pieces(base, range(259)) == []


def test_pieces_whose_parts_are_missing_are_dropped_until_stable(make_proto):
    base = make_proto([("▁", -1e9), *((c, -1.0 - i) for i, c in enumerate("가나다라마"))])
    merged, dropped = merge_reachable(base, ["가나다", "나다", "가나다라마", "라마"])
    # "나다" comes second, so "가나다" is 가+나다, and the five syllables are 가나다+라마.
    assert dropped == []
    assert unreachable_pieces(merged, range(264, 269)) == []
    merged, dropped = merge_reachable(base, ["가나", "나다", "가나다라마", "라마", "다라마"])
    # 가나 before 나다; then 라마, 다라마: 가나+다라마 makes the whole.
    assert dropped == []
    merged, dropped = merge_reachable(base, ["나다", "가나다라마", "가나다라", "라마"])
    assert set(dropped) == {"가나다라마", "가나다라"}
    assert [piece.piece for piece in merged.pieces[265:]] == ["나다", "라마"]


def test_pieces_that_make_a_base_piece_unreachable_are_refused(make_proto):
    base = make_proto([("a", -1.0), *(("▁" * n, -1e9) for n in (1, 2, 4, 8))])
    assert unreachable_pieces(base, range(263)) == []
    with pytest.raises(TokenizerError, match="would make 1 base pieces unreachable, '▁▁▁▁▁▁▁▁' among them"):
        merge_reachable(base, ["▁▁▁▁▁"])


@pytest.mark.parametrize("pieces", [[""], ["한국", "한국"], ["▁the"]])
def test_empty_duplicate_and_known_pieces_are_refused(base, pieces):
    with pytest.raises(TokenizerError, match="is empty, given twice or in the base; append each new piece once"):
        merge_pieces(base, pieces)


def test_piece_with_an_unknown_character_is_refused(base):
    with pytest.raises(TokenizerError, match="the piece '한꽃' has the character '꽃', which is no piece itself"):
        merge_pieces(base, ["한꽃"])
    assert len(merge_pieces(base, ["한꽃", "꽃"]).pieces) == len(base.pieces) + 2


def test_english_ids_are_unchanged(base_path, tokenizer, english_lines):
    assert tokenizer.encode_batch(english_lines) == Tokenizer(base_path).encode_batch(english_lines)


def test_english_ids_of_a_real_base_are_unchanged(real_base_path, trained, english_lines, tmp_path):
    base = load_model_proto(real_base_path)
    merged, dropped = merge_reachable(base, script_pieces(trained, base))
    assert dropped == []
    path = tmp_path / "tokenizer.model"
    path.write_bytes(merged.SerializeToString())
    assert Tokenizer(path).encode_batch(english_lines) == Tokenizer(real_base_path).encode_batch(english_lines)


def test_hybrid_shortens_korean(base_path, tokenizer, korean_texts):
    before = sum(map(len, Tokenizer(base_path).encode_batch(korean_texts)))
    after = sum(map(len, tokenizer.encode_batch(korean_texts)))
    assert after < before / 4

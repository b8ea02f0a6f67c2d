import pytest

from redwhale.tokenizer import (
    TokenizerError,
    choose_pieces,
    count_words,
    merge_pieces,
    mix_words,
    script_pieces,
    unreachable_pieces,
)
from redwhale.tokenizer.base_pruning import prune_base
from redwhale.tokenizer.reserved import reserve_pieces
from redwhale.tokenizer.selection import final_splits, usage, with_merge_steps
from redwhale.tokenizer.spm import bare_processor


@pytest.fixture(scope="module")
def words(korean_texts):
    return mix_words(count_words(("", text) for text in korean_texts))


def new_dead(base, pieces):
    merged = merge_pieces(base, pieces)
    return unreachable_pieces(merged, range(len(base.pieces), len(merged.pieces)))


def tokens(base, pieces, words):
    return sum(usage(merge_pieces(base, pieces), list(words), list(words.values())))


@pytest.mark.parametrize("limit", [150, 200, 300])
def test_pruning_to_a_number_leaves_every_piece_reachable(base, trained, words, limit):
    chosen = choose_pieces(base, script_pieces(trained, base), words, max_pieces=limit)
    assert len(chosen.pieces) == limit
    assert chosen.unreachable == []
    assert new_dead(base, chosen.pieces) == []
    order = {piece: i for i, piece in enumerate(script_pieces(trained, base))}
    assert [order[piece] for piece in chosen.pieces] == sorted(order[piece] for piece in chosen.pieces)


def test_naive_pruning_by_frequency_leaves_unreachable_pieces(base, trained, words):
    candidates = script_pieces(trained, base)
    use = choose_pieces(base, candidates, words).frequencies
    ranked = sorted(zip(use, candidates, strict=True), reverse=True)[:250]
    naive = {piece for _, piece in ranked} | {piece for piece in candidates if len(piece) == 1}
    assert len(new_dead(base, [piece for piece in candidates if piece in naive])) > 0


def test_chosen_pieces_save_more_tokens_than_the_earliest_ones(base, trained, words):
    candidates = script_pieces(trained, base)
    singles = sum(len(piece) == 1 for piece in candidates)
    chosen = choose_pieces(base, candidates, words, max_pieces=singles + 60).pieces
    order = sorted(range(len(candidates)), key=lambda i: (len(candidates[i]) > 1, i))
    earliest = [candidates[i] for i in sorted(order[: len(chosen)])]
    assert tokens(base, chosen, words) <= tokens(base, earliest, words)


def test_frequencies_are_those_of_the_encoder(base, trained, words):
    chosen = choose_pieces(base, script_pieces(trained, base), words, max_pieces=250)
    merged = merge_pieces(base, chosen.pieces)
    processor = bare_processor(merged)
    counted = dict.fromkeys(chosen.pieces, 0.0)
    for word, count in words.items():
        for piece in processor.encode(word, out_type=str):
            if piece in counted:
                counted[piece] += count
    assert dict(zip(chosen.pieces, chosen.frequencies, strict=True)) == pytest.approx(counted)


def test_rare_leaves_go_until_the_set_is_stable(base, trained, words):
    chosen = choose_pieces(base, script_pieces(trained, base), words, min_frequency=30)
    parts = {
        part for split in final_splits(merge_pieces(base, chosen.pieces), chosen.pieces).values() for part in split
    }
    for piece, frequency in zip(chosen.pieces, chosen.frequencies, strict=True):
        assert frequency >= 30 or piece in parts
    assert new_dead(base, chosen.pieces) == []
    assert len(chosen.pieces) < len(script_pieces(trained, base))


def test_protected_pieces_stay(base, trained, words):
    candidates = script_pieces(trained, base)
    rare = min(zip(choose_pieces(base, candidates, words).frequencies, candidates, strict=True))[1]
    assert rare not in choose_pieces(base, candidates, words, max_pieces=150).pieces
    assert rare in choose_pieces(base, candidates, words, max_pieces=150, protected=[rare]).pieces


def test_unigram_pieces_get_the_steps_that_merging_needs(make_proto):
    base = make_proto([("▁", -1e9), ("가", -1.0), ("나", -2.0)])
    pieces = with_merge_steps(base, ["가나다라", "▁라"])
    assert set(pieces) >= {"다", "라", "▁라", "가나", "가나다", "가나다라"}
    assert new_dead(base, pieces) == []


def test_reserved_pieces_fill_up_to_a_multiple(base, hybrid):
    padded = type(hybrid).FromString(hybrid.SerializeToString())
    added = reserve_pieces(padded, 64)
    assert len(padded.pieces) % 64 == 0
    assert added == len(padded.pieces) - len(hybrid.pieces) < 64
    texts = ["할머니께서 <|reserved_0|>", "the 도서관"]
    assert bare_processor(padded).encode(texts) == bare_processor(hybrid).encode(texts)


def test_base_without_unused_pieces_encodes_what_it_was_pruned_on_alike(base, english_lines):
    texts = english_lines[:400]
    pruned, old_ids = prune_base(base, texts, min_frequency=2)
    assert len(pruned.pieces) == len(old_ids) < len(base.pieces) - 100
    assert [piece.piece for piece in pruned.pieces] == [base.pieces[i].piece for i in old_ids]
    assert old_ids[:259] == list(range(259))
    before = set(unreachable_pieces(base, old_ids))
    assert {old_ids[i] for i in unreachable_pieces(pruned, range(len(pruned.pieces)))} == before
    kept, same = set(old_ids), 0
    for text in texts:
        old = bare_processor(base).encode(text) if len(text) < 40 else None
        if old and kept.issuperset(old):
            same += 1
            assert [old_ids[i] for i in bare_processor(pruned).encode(text)] == old
    assert same > 10
    with pytest.raises(TokenizerError, match="no text to count the pieces of the base on"):
        prune_base(base, [])

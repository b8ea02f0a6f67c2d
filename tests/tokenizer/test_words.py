import random
from collections import Counter

import pytest

from redwhale.tokenizer import TokenizerError, count_words, mix_words, sample_documents


def test_words_have_their_space_and_end_at_other_scripts():
    counts = count_words([("a", "한국 한국어ABC는\n줄 \u1112\u1161"), ("b", "ㅋㅋ 학교▁길")])
    assert counts == {
        "a": Counter({"▁한국": 1, "▁한국어": 1, "는": 1, "줄": 1, "▁하": 1}),
        "b": Counter({"▁학교": 1, "▁길": 1}),
    }


def test_scripts_widen_what_counts():
    counts = count_words([("", "하ㅋㅋ 漢字 Été 🐳")], ("hangul", "jamo", "hanja", "latin", "emoji"))
    assert counts[""].keys() == {"▁하ㅋㅋ", "▁漢字", "▁Été", "▁🐳"}
    with pytest.raises(TokenizerError, match="scripts are \\['greek'\\]; choose from hangul, jamo"):
        count_words([], ("greek",))  # type: ignore[arg-type]


def test_long_runs_are_cut_and_lose_nothing():
    counts = count_words([("", "가" * 1000)])
    assert sum(len(word) * count for word, count in counts[""].items()) == 1001
    assert max(map(len, counts[""])) == 64


@pytest.mark.parametrize(("balance", "shares"), [(1.0, (90, 10)), (0.0, (50, 50)), (0.5, (75, 25))])
def test_balance_sets_the_shares_and_keeps_the_scale(balance, shares):
    mixed = mix_words({"big": {"가": 90}, "small": {"나": 10}}, balance=balance)
    assert (mixed["가"], mixed["나"]) == pytest.approx(shares)


def test_weights_multiply_shares_and_must_name_a_source():
    counts = {"a": {"가": 50}, "b": {"나": 50}}
    assert mix_words(counts, weights={"a": 3.0}) == pytest.approx({"가": 75, "나": 25})
    assert mix_words(counts, weights={"a": 0.0}) == pytest.approx({"나": 100})
    with pytest.raises(TokenizerError, match="weights name the source 'c'; the corpus has a, b"):
        mix_words(counts, weights={"c": 1.0})


def test_sample_does_not_depend_on_order_and_fills_its_limit():
    rng = random.Random(0)
    texts = [("s", f"{i} " + "가" * rng.randint(0, 400)) for i in range(500)]
    total = sum(len(text.encode()) for _, text in texts)
    sample = sample_documents(texts, total // 5, seed=1)
    assert total // 5 - 2 <= sum(len(text.encode()) for _, text in sample) <= total // 5
    assert set(sample[:-1]) < set(texts)
    rng.shuffle(texts)
    assert sample_documents(iter(texts), total // 5, seed=1) == sample
    assert sample_documents(texts, total // 5, seed=2) != sample
    assert sorted(sample_documents(texts, total, seed=1)) == sorted(texts)


def test_sample_is_uniform():
    counts = [0] * 20
    for seed in range(2000):
        for _, text in sample_documents([("", f"{i:02d}") for i in range(20)], 10, seed):
            counts[int(text)] += 1
    # 5 of 20 texts are kept: binomial(2000, 1/4) has a standard deviation of 19.4.
    assert sum(counts) == 10_000
    assert max(abs(count - 500) for count in counts) < 5 * 19.4


def test_sample_of_one_huge_document_is_cut_between_characters():
    assert sample_documents([("", "가나다라")], 8, seed=0) == [("", "가나")]
    with pytest.raises(TokenizerError, match="max_bytes is 0; give a positive number of bytes"):
        sample_documents([], 0, seed=0)

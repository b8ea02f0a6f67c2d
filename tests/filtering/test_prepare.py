"""The batched counts against counts made one word at a time."""

import random
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_korean import bad_documents, good_documents

from redwhale.filtering import CorpusError, normalize_text, prepare, prepare_batch, wordlists
from redwhale.filtering.prepare import LONG_EOJEOL, WINDOW

TEXTS = [normalize_text(one.text) for one in [*good_documents(40, seed=21), *bad_documents(3, seed=22)]]
FEW_WORDS = st.lists(
    st.sampled_from(["가", "나다", "라", "ab", "\n", "ㅋㅋ", "가나다라마바사아자차카타파하거너" * 3]), max_size=60
)


def covered(words: list[str], places: list[int], n: int) -> int:
    return sum(len(words[place]) for place in {start + offset for start in places for offset in range(n)})


def top_ngram(words: list[str], n: int) -> int:
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    counts = {gram: count for gram, count in Counter(grams).items() if count > 1}
    if not counts:
        return 0
    top = max(counts, key=lambda gram: counts[gram] * sum(map(len, gram)))
    return covered(words, [start for start, gram in enumerate(grams) if gram == top], n)


def repeated_ngrams(words: list[str], n: int) -> int:
    seen, places = set(), []
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        if gram in seen:
            places.append(start)
        seen.add(gram)
    return covered(words, places, n)


def windows(words: list[str]) -> tuple[int, int]:
    text, starts = "", []
    for word in words:
        starts += [len(text) + offset for offset in range(len(word)) if offset == 0 or offset >= 9]
        text += word
    found = [text[start : start + WINDOW] for start in starts if start + WINDOW <= len(text)]
    return len(found), len(found) - len(set(found))


def check(text: str) -> None:
    document = prepare(text)
    words = text.split()
    assert document.eojeol == len(words)
    assert document.non_space == sum(map(len, words))
    assert document.long_eojeol == sum(len(word) for word in words if len(word) > LONG_EOJEOL)
    assert document.counts["hangul"] == sum("가" <= character <= "힣" for character in text)
    assert document.counts["digit"] == sum(character.isdigit() for character in text)
    assert document.top_ngram == {n: top_ngram(words, n) for n in (2, 3)}
    assert document.repeated_ngrams == {5: repeated_ngrams(words, 5)}
    assert (document.windows, document.repeated_windows) == windows(words)


@pytest.mark.parametrize("text", TEXTS[::4], ids=range(len(TEXTS[::4])))
def test_counts_of_real_texts_equal_those_made_word_by_word(text):
    check(text)


@settings(max_examples=150, deadline=None)
@given(FEW_WORDS)
def test_counts_of_texts_that_repeat_a_lot_equal_those_made_word_by_word(words):
    check(normalize_text(" ".join(words)))


def test_a_document_has_the_same_counts_in_any_batch():
    alone = [prepare(text) for text in TEXTS]
    assert prepare_batch(TEXTS) == alone
    order = list(range(len(TEXTS)))
    random.Random(0).shuffle(order)
    assert prepare_batch([TEXTS[place] for place in order]) == [alone[place] for place in order]
    assert prepare_batch([]) == []
    assert prepare_batch(["", "가", ""])[1] == prepare("가")


def test_equal_texts_in_one_batch_are_no_repeats_of_each_other():
    text = TEXTS[0]
    assert prepare_batch([text] * 3) == [prepare(text)] * 3


def test_beyond_a_million_characters_only_the_length_goes_on():
    document = prepare("고래는 바다에 산다. " * 200_000)
    assert len(document.text) == 2_400_000 > document.non_space


def test_no_word_stands_in_two_lists_and_none_is_blank():
    folder = wordlists.FOLDER
    words = [word for name in wordlists.LISTS for word in (folder / f"{name}.txt").read_text("utf-8").splitlines()]
    assert {path.stem for path in folder.iterdir()} == set(wordlists.LISTS)
    assert len(words) == len(set(words)) > 300
    assert all(word == normalize_text(word) != "" for word in words)


def test_the_longest_listed_word_wins():
    assert wordlists.find_listed("카지노사이트와 카지노") == {"gambling": [(0, 6)], "gambling_weak": [(8, 11)]}


def test_without_the_search_library_rules_name_the_extra(monkeypatch):
    wordlists._automaton.cache_clear()
    monkeypatch.setitem(sys.modules, "ahocorasick_rs", None)
    with pytest.raises(CorpusError, match=r'the rules need ahocorasick_rs: pip install "redwhale\[filtering\]"'):
        prepare("고래")
    wordlists._automaton.cache_clear()

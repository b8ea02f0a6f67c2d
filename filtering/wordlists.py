"""Lists of words and phrases that rules look for, and their search in one pass (Aho-Corasick).

The lists, words/NAME.txt with one entry a line, are short on purpose: words that ordinary Korean uses as well are left
out or stand in a list of weak words, which count less. They were written for this project; none is taken over.
"""

import functools
from pathlib import Path
from typing import Any

from .errors import CorpusError

LISTS = (
    *("gambling", "gambling_weak", "adult", "adult_weak", "advertising", "boilerplate", "template", "hate"),
    "misread",  # U+FFFD in UTF-8, read as CP949
)
"""Names of the lists."""

FOLDER = Path(__file__).with_name("words")
"""Holds NAME.txt for every list, one word or phrase a line; no word stands in two."""


def find_listed(text: str) -> dict[str, list[tuple[int, int]]]:
    """Returns where listed words stand in a text, as (start, end) by list; the leftmost and longest wins an overlap.

    Raises CorpusError when ahocorasick_rs is not installed.
    """
    automaton, list_of = _automaton()
    found: dict[str, list[tuple[int, int]]] = {}
    for pattern, start, end in automaton.find_matches_as_indexes(text):
        found.setdefault(list_of[pattern], []).append((start, end))
    return found


@functools.cache
def _automaton() -> tuple[Any, list[str]]:
    try:
        import ahocorasick_rs
    except ImportError as error:
        raise CorpusError('the rules need ahocorasick_rs: pip install "redwhale[filtering]"') from error
    list_of = {word: name for name in LISTS for word in (FOLDER / f"{name}.txt").read_text("utf-8").splitlines()}
    automaton = ahocorasick_rs.AhoCorasick(list(list_of), matchkind=ahocorasick_rs.MatchKind.LeftmostLongest)
    return automaton, list(list_of.values())

"""Choose the pieces to add: by script, by frequency, and down to a number, leaf by leaf of the merge forest."""

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from .merge import merge_reachable
from .spm import NORMAL, SPACE, ModelProto, bare_processor, decompose_pieces
from .words import Script, script_runs


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Pieces to append, and how often the words of the corpus use each as a token."""

    pieces: list[str]  # in training order
    frequencies: list[float]  # of each piece
    unreachable: list[str]  # candidates that no text would ever produce
    rounds: int  # times the words were encoded before nothing changed any more


def script_pieces(trained: ModelProto, base: ModelProto, scripts: Sequence[Script] = ("hangul",)) -> list[str]:
    """Return the pieces of `trained` that are one run of a script, with or without ▁, and not in `base`, in order."""
    pattern = re.compile(f"{SPACE}?{script_runs(scripts)}")
    known = {piece.piece for piece in base.pieces}
    return [
        piece.piece
        for piece in trained.pieces
        if piece.type == NORMAL and piece.piece not in known and pattern.fullmatch(piece.piece)
    ]


def with_merge_steps(base: ModelProto, pieces: Sequence[str]) -> list[str]:
    """Return pieces of a unigram model in an order for merging, shorter ones first, with the steps that they lack.

    A unigram model has no merges: a piece that is no two shorter pieces gets its beginnings as steps.
    """
    known = {piece.piece for piece in base.pieces if piece.type == NORMAL}
    place = {piece: i for i, piece in enumerate(pieces)}
    available = known | set(pieces) | {character for piece in pieces for character in piece}
    for piece in sorted(pieces, key=len):
        step = piece
        while not any(step[:cut] in available and step[cut:] in available for cut in range(1, len(step))):
            step = step[:-1]
            if len(step) < 2 or step in available:
                break
            available.add(step)
    return sorted(available - known, key=lambda piece: (len(piece), place.get(piece, len(place)), piece))


def choose_pieces(
    base: ModelProto,
    candidates: Sequence[str],
    words: Mapping[str, float],
    *,
    max_pieces: int | None = None,
    min_frequency: float = 0,
    protected: Collection[str] = (),
    threads: int = 1,
) -> Selection:
    """Return the candidates that save the most tokens on `words` when appended to `base`.

    What a piece saves is its count as a token, since without it each occurrence is the two pieces it is merged from
    (for a character, its bytes). The piece that saves least goes first, only ever a leaf, which no other piece is
    merged from, and its count goes to its parts. The words are encoded again after every round, until nothing is below
    `min_frequency` (the loop of EEVE, arXiv 2402.14714) and no more than `max_pieces` are left.

    Args:
        base: which the pieces are appended to.
        candidates: in training order.
        words: frequencies of words, with ▁ in front where a space is.
        max_pieces: most pieces to return; None for no limit.
        min_frequency: least count of a piece as a token, for pieces that no other is merged from.
        protected: pieces that stay.
        threads: native threads of the encoder.

    Raises:
        TokenizerError: when the candidates would make a piece of the base unreachable.
    """
    texts, counts = list(words), list(words.values())

    def measure(pieces: Sequence[str]) -> tuple[list[str], dict[str, float], list[str]]:
        merged, lost = merge_reachable(base, pieces)
        names = [piece.piece for piece in merged.pieces]
        return names[len(base.pieces) :], dict(zip(names, usage(merged, texts, counts, threads), strict=True)), lost

    merged, unreachable = merge_reachable(base, candidates)
    reachable = [piece.piece for piece in merged.pieces[len(base.pieces) :]]
    splits = final_splits(merged, reachable)
    characters = [piece for piece in reachable if not splits[piece]]
    saved = dict.fromkeys(reachable, 1.0)
    saved |= {piece: len(ids) - 1.0 for piece, ids in zip(characters, decompose_pieces(base, characters), strict=True)}
    selection = choose(
        reachable, splits, saved, measure, max_pieces=max_pieces, min_frequency=min_frequency, protected=protected
    )
    return msgspec.structs.replace(selection, unreachable=unreachable + selection.unreachable)


def choose(
    pieces: Sequence[str],
    splits: Mapping[str, Sequence[str]],
    saved: Mapping[str, float],
    measure: Callable[[Sequence[str]], tuple[list[str], dict[str, float], list[str]]],
    *,
    max_pieces: int | None,
    min_frequency: float,
    protected: Collection[str],
) -> Selection:
    """Return the pieces that save most, as `choose_pieces` does, whatever kind of tokenizer they belong to.

    Args:
        pieces: candidates in training order.
        splits: what each is merged from; empty for characters.
        saved: tokens that one use of each saves.
        measure: returns the pieces that some text produces, the uses of all pieces, and the others.
        max_pieces: most pieces to return; None for no limit.
        min_frequency: least use of a leaf.
        protected: pieces that stay.
    """
    unreachable: list[str] = []
    left, rounds = list(pieces), 0
    while True:
        rounds += 1
        kept, use, lost = measure(left)
        unreachable += lost
        surplus = max(0, len(kept) - max_pieces) if max_pieces is not None else 0
        # Counts that were handed down are estimates, so a large surplus goes in steps.
        goal = len(kept) - (surplus if surplus <= max(100, len(kept) // 50) else surplus * 2 // 3)
        estimate = dict(use)
        left = shed_leaves(kept, splits, estimate, protected, lambda _: 1.0, lambda _, cost: cost < min_frequency)
        left = shed_leaves(
            left, splits, estimate, protected, saved.__getitem__, lambda alive, _, goal=goal: alive > goal
        )
        if len(left) == len(kept):
            frequencies = [use[piece] for piece in kept]
            return Selection(pieces=kept, frequencies=frequencies, unreachable=unreachable, rounds=rounds)


def shed_leaves(
    pieces: Sequence[str],
    splits: Mapping[str, Sequence[str]],
    use: dict[str, float],
    protected: Collection[str],
    weight: Callable[[str], float],
    goes: Callable[[int, float], bool],
) -> list[str]:
    """Return `pieces` without the leaves of least use × weight, taken while `goes(pieces left, use × weight)` is true.

    Args:
        pieces: in the order that the result keeps.
        splits: what each piece is merged from; empty for characters.
        use: counts of all pieces, `splits` included; those of a piece that goes are added to its parts, in place.
        protected: pieces that stay.
        weight: tokens that one use saves.
        goes: whether a leaf goes.
    """
    alive, fixed = set(pieces), set(protected)
    children = Counter(part for piece in pieces for part in set(splits[piece]))
    cost = lambda piece: use[piece] * weight(piece)  # noqa: E731
    heap = [(cost(piece), piece) for piece in pieces if not children[piece] and piece not in fixed]
    heapq.heapify(heap)
    while heap:
        price, piece = heapq.heappop(heap)
        if price != cost(piece):  # got the count of a longer piece meanwhile
            heapq.heappush(heap, (cost(piece), piece))
            continue
        if not goes(len(alive), price):
            break
        alive.discard(piece)
        for part in splits[piece]:
            use[part] += use[piece]
        for part in set(splits[piece]):
            children[part] -= 1
            if not children[part] and part in alive and part not in fixed:
                heapq.heappush(heap, (cost(part), part))
    return [piece for piece in pieces if piece in alive]


def usage(proto: ModelProto, texts: Sequence[str], counts: Sequence[float], threads: int = 1) -> list[float]:
    """Return how often each id of `proto` occurs in `texts`, each taken `counts` times and without dummy prefix."""
    total = [0.0] * len(proto.pieces)
    for ids, count in zip(bare_processor(proto).encode(list(texts), num_threads=threads), counts, strict=True):
        for i in ids:
            total[i] += count
    return total


def final_splits(proto: ModelProto, pieces: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the two pieces that each reachable piece is merged from in the end; () for a single character."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    return {piece: _final_split(piece, scores) for piece in pieces}


def _final_split(piece: str, scores: Mapping[str, float]) -> tuple[str, ...]:
    symbols = list(piece)
    while len(symbols) > 2:
        joined = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        i = -max(joined)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return tuple(symbols) if len(symbols) == 2 else ()

"""Learn further merges of a byte-level BPE on words that its own merges have already been applied to."""

import heapq
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Any

from .errors import TokenizerError

# Rarer words together hold few tokens, and every distinct word takes time and memory.
_MOST_WORDS = 400_000
_LONGEST_TOKEN = 48  # bytes, 16 Hangul syllables


def learn_merges(
    encoder: Any,
    vocabulary: Mapping[str, int],
    words: Mapping[str, float],
    number: int,
    bytes_of: Callable[[str], bytes],
    *,
    required: Collection[str] = (),
) -> list[tuple[str, str]]:
    """Return the next merges that BPE would learn (Sennrich et al. 2016, arXiv 1508.07909), most frequent pair first.

    Every merge joins what the base really produces, so every new token is reachable. Tokens are whole characters, or
    parts of a single one.

    Args:
        encoder: of the base's merges alone, as from `ByteLevelBPE.encoder`.
        vocabulary: ids of the base's tokens.
        words: frequencies of words in the byte alphabet.
        number: merges to learn.
        bytes_of: turns a token into its bytes.
        required: words in the byte alphabet that become tokens first, whether or not the corpus has them.

    Raises:
        TokenizerError: when the words run out of pairs that occur twice before that many are learned.
    """
    chosen = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:_MOST_WORDS]
    names = {i: token for token, i in vocabulary.items()}
    sequences = _spelled(encoder, names, [word for word, _ in chosen])
    counts = [count for _, count in chosen]
    merges: list[tuple[str, str]] = []
    made: set[str] = set()
    for tokens in _spelled(encoder, names, sorted(required)):
        while len(tokens) > 1:
            a, b, *rest = tokens
            tokens = [a + b, *rest]
            if a + b not in made and a + b not in vocabulary:
                merges.append((a, b))
                made.add(a + b)
    for pair in merges:
        sequences = [_joined(tokens, pair) for tokens in sequences]
    allowed: dict[tuple[str, str], bool] = {}

    def joins(pair: tuple[str, str]) -> bool:
        if pair not in allowed:
            allowed[pair] = pair[0] + pair[1] not in vocabulary and _is_clean(bytes_of(pair[0]) + bytes_of(pair[1]))
        return allowed[pair]

    frequency: dict[tuple[str, str], float] = {}
    places: dict[tuple[str, str], set[int]] = {}
    for i, tokens in enumerate(sequences):
        for pair in pairwise(tokens):
            if joins(pair):
                frequency[pair] = frequency.get(pair, 0.0) + counts[i]
                places.setdefault(pair, set()).add(i)
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(heap)
    while len(merges) < number:
        if not heap:
            raise TokenizerError(f"vocab_size {number} is too large for this corpus; use at most {len(merges)}")
        count, pair = heapq.heappop(heap)
        if -count != frequency[pair]:
            if frequency[pair] > 0:
                heapq.heappush(heap, (-frequency[pair], pair))
            continue
        if pair[0] + pair[1] in made:  # the same bytes by another way: a vocabulary holds them once
            continue
        if -count < 2:
            raise TokenizerError(f"vocab_size {number} is too large for this corpus; use at most {len(merges)}")
        merges.append(pair)
        made.add(pair[0] + pair[1])
        touched = set()
        for i in places.pop(pair):
            before = sequences[i]
            after = _joined(before, pair)
            if len(after) == len(before):
                continue
            for old in pairwise(before):
                if old in frequency:
                    frequency[old] = max(0.0, frequency[old] - counts[i])
            for new in pairwise(after):
                if joins(new):
                    frequency[new] = frequency.get(new, 0.0) + counts[i]
                    places.setdefault(new, set()).add(i)
                    touched.add(new)
            sequences[i] = after
        frequency[pair] = 0.0
        for new in touched:
            heapq.heappush(heap, (-frequency[new], new))
    return merges


def _spelled(encoder: Any, names: Mapping[int, str], words: list[str]) -> list[list[str]]:
    # The fast call leaves the encoding's own tokens empty.
    return [[names[i] for i in encoding.ids] for encoding in encoder.encode_batch_fast(words)]


def _joined(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    i = 0
    while i < len(tokens):
        if i + 1 < len(tokens) and tokens[i] == pair[0] and tokens[i + 1] == pair[1]:
            joined.append(pair[0] + pair[1])
            i += 2
        else:
            joined.append(tokens[i])
            i += 1
    return joined


def _is_clean(data: bytes) -> bool:
    """Whether bytes are whole characters, or the beginning of a single one."""
    if len(data) > _LONGEST_TOKEN:
        return False
    try:
        data.decode()
    except UnicodeDecodeError as error:
        lead = data.lstrip(b" ")
        return error.reason == "unexpected end of data" and len(lead) < 4 and lead[:1] >= b"\xc0"
    return True

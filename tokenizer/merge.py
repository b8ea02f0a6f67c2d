"""Append Korean pieces to a base tokenizer so that every id of the base keeps its meaning and its reachability."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from .errors import TokenizerError
from .spm import NORMAL, SPACE, ModelProto, bare_processor

_SYLLABLES = re.compile(f"{SPACE}?[가-힣]+")
_SYLLABLES_AND_JAMO = re.compile(f"{SPACE}?[가-힣ㄱ-ㅣ]+")  # ㅋㅋㅋ and ㅠㅠ as well


def hangul_pieces(trained: ModelProto, *, keep_jamo: bool = False) -> list[str]:
    """Return the pieces of pure Hangul syllables, with or without a leading ▁, in training order.

    keep_jamo admits compatibility jamo (ㅋㅋ) too.
    """
    pattern = _SYLLABLES_AND_JAMO if keep_jamo else _SYLLABLES
    return [piece.piece for piece in trained.pieces if piece.type == NORMAL and pattern.fullmatch(piece.piece)]


def select_hangul_pieces(
    trained: ModelProto, base: ModelProto, *, max_pieces: int | None = None, keep_jamo: bool = False
) -> list[str]:
    """Return the Hangul pieces of `trained` that `base` lacks, in training order, at most `max_pieces` of them.

    A limit keeps all single syllables first, which every longer piece is built from (BPE training lists them last,
    by frequency), then the earliest merges; so what is left out are leaves of the merge forest only.
    """
    known = {piece.piece for piece in base.pieces}
    pieces = [piece for piece in hangul_pieces(trained, keep_jamo=keep_jamo) if piece not in known]
    if max_pieces is None or len(pieces) <= max_pieces:
        return pieces
    order = sorted(range(len(pieces)), key=lambda i: (len(pieces[i]) > 1, i))
    return [pieces[i] for i in sorted(order[:max_pieces])]


def merge_pieces(base: ModelProto, pieces: Sequence[str]) -> ModelProto:
    """Return `base` with `pieces` appended: base ids and scores unchanged, new scores below those of the base.

    The new scores fall by at least one from the lowest score of a base piece that is not whitespace only (Llama
    and Mistral keep whitespace runs at -1e9, which stay last), in the order given, and are distinct in float32.
    Raises TokenizerError when a piece is empty, given twice, in the base already, or has a character that is
    neither in the base nor in `pieces`: SentencePiece would build such a piece, an exported list of merges could not.
    """
    known = {piece.piece for piece in base.pieces}
    allowed = known | set(pieces)
    lowest = min(piece.score for piece in base.pieces if piece.type == NORMAL and piece.piece.strip(SPACE))
    score = np.float32(lowest)
    merged = ModelProto()
    merged.CopyFrom(base)
    for piece in pieces:
        if not piece or piece in known:
            raise TokenizerError(
                f"the piece {piece!r} is empty, given twice or in the base; append each new piece once"
            )
        known.add(piece)
        missing = set(piece) - allowed
        if missing:
            raise TokenizerError(
                f"the piece {piece!r} has the character {min(missing)!r}, which is no piece itself; "
                "append its characters too"
            )
        score = np.float32(score - max(np.float32(1), np.spacing(-score)))
        merged.pieces.add(piece=piece, score=float(score))
    merged.trainer_spec.vocab_size = len(merged.pieces)
    return merged


def unreachable_pieces(proto: ModelProto, ids: Iterable[int]) -> list[int]:
    """Return those of the ids of normal pieces that no text is ever encoded to.

    A piece is reachable exactly when it is its own encoding, without dummy prefix: merges inside a span happen in
    the same order in every context, and a merge across its border prevents the piece.
    """
    ids = [i for i in ids if proto.pieces[i].type == NORMAL]
    encoded = bare_processor(proto).encode([proto.pieces[i].piece for i in ids])
    return [i for i, own in zip(ids, encoded, strict=True) if own != [i]]


def merge_reachable(base: ModelProto, pieces: Sequence[str]) -> tuple[ModelProto, list[str]]:
    """Return the merged model without the new pieces that could never be produced, and those dropped pieces.

    Dropping repeats until every new piece is reachable.
    Raises TokenizerError when the new pieces would make a base piece unreachable that was reachable.
    """
    size = len(base.pieces)
    kept, dropped = list(pieces), []
    while True:
        merged = merge_pieces(base, kept)
        dead = {merged.pieces[i].piece for i in unreachable_pieces(merged, range(size, len(merged.pieces)))}
        if not dead:
            break
        dropped += [piece for piece in kept if piece in dead]
        kept = [piece for piece in kept if piece not in dead]
    lost = set(unreachable_pieces(merged, range(size))) - set(unreachable_pieces(base, range(size)))
    if lost:
        example = base.pieces[min(lost)].piece
        raise TokenizerError(
            f"the new pieces would make {len(lost)} base pieces unreachable, {example!r} among them; "
            "append only pieces without runs of whitespace"
        )
    return merged, dropped

"""Append Korean pieces to a base tokenizer so that every id of the base keeps its meaning and its reachability."""

from collections.abc import Iterable, Sequence

import numpy as np

from .errors import TokenizerError
from .spm import NORMAL, SPACE, ModelProto, bare_processor


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

"""Leave out pieces of a base that the target never uses; the ids of the rest move up."""

from collections.abc import Iterable

from .errors import TokenizerError
from .merge import unreachable_pieces
from .selection import final_splits, shed_leaves, usage
from .spm import NORMAL, ModelProto, nfc


def prune_base(base: ModelProto, texts: Iterable[str], *, min_frequency: float = 1) -> tuple[ModelProto, list[int]]:
    """Return `base` without the pieces that `texts` use less than `min_frequency` times, and the old id of each piece.

    Only leaves of the merge forest go, over and over, so every piece that stays is reached as before and texts that
    used none of the others keep their pieces. Specials, bytes, single characters and whitespace stay.

    Args:
        base: a SentencePiece BPE; its file is not changed.
        texts: of every language that the model is to know, English among them.
        min_frequency: least count as a token.

    Raises:
        TokenizerError: when the texts are empty.
    """
    lines = [line for text in texts for line in nfc(text).replace(" ", "▁").splitlines(keepends=True)]
    if not lines:
        raise TokenizerError("there is no text to count the pieces of the base on; give some of every language")
    counts = usage(base, ["▁" + line for line in lines], [1.0] * len(lines))
    unreachable = set(unreachable_pieces(base, range(len(base.pieces))))
    normal = [
        piece.piece
        for i, piece in enumerate(base.pieces)
        if piece.type == NORMAL and len(piece.piece.strip("▁")) and len(piece.piece) > 1 and i not in unreachable
    ]
    splits = final_splits(base, normal)
    use = {piece.piece: count for piece, count in zip(base.pieces, counts, strict=True)}
    left = shed_leaves(normal, splits, use, (), lambda _: 1.0, lambda _, cost: cost < min_frequency)
    gone = set(normal) - set(left)
    pruned = ModelProto()
    pruned.CopyFrom(base)
    del pruned.pieces[:]
    old_ids = [i for i, piece in enumerate(base.pieces) if piece.piece not in gone or piece.type != NORMAL]
    for i in old_ids:
        pruned.pieces.add().CopyFrom(base.pieces[i])
    pruned.trainer_spec.vocab_size = len(pruned.pieces)
    # Specials and bytes come first in every base that can be extended, so their ids stay; unk, bos and eos with them.
    return pruned, old_ids

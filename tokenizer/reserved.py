"""Fill a vocabulary up with reserved control pieces, which later special tokens can take over."""

from .spm import CONTROL, ModelProto


def reserved_name(number: int) -> str:
    """Return the name of a reserved piece."""
    return f"<|reserved_{number}|>"


def reserve_pieces(proto: ModelProto, multiple: int) -> int:
    """Append control pieces to `proto`, in place, up to a multiple; return how many.

    A vocabulary of a multiple of 64 or 128 suits the tiles of matrix products.
    """
    missing = -len(proto.pieces) % multiple
    for number in range(missing):
        proto.pieces.add(piece=reserved_name(number), score=0.0, type=CONTROL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return missing

"""Give a checkpoint the rows of another vocabulary that holds a part of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import VOCABULARY_TENSORS, CheckpointReader, write_checkpoint
from .errors import CheckpointError


def remap_checkpoint(
    base: Path, output: Path, old_ids: Sequence[int | None], *, extra_files: Sequence[Path] = ()
) -> None:
    """Write `base` with row i of embedding and head taken from its row `old_ids[i]`, one tensor in memory at a time.

    Rows are copied, so the logits of a token that both vocabularies have are the same bits. Where an id is None, the
    row is the mean of all old ones.

    Args:
        base: Hugging Face checkpoint.
        output: folder of the new checkpoint.
        old_ids: for every new id, the token's old one.
        extra_files: copied into `output`, such as tokenizer files.

    Raises:
        CheckpointError: for an old id outside the vocabulary, or when a special token of the configuration is left out.
    """
    reader = CheckpointReader(base)
    config = reader.config
    outside = [i for i in old_ids if i is not None and not 0 <= i < config.vocab_size]
    if outside:
        raise CheckpointError(
            f"{base} has no token {outside[0]}, only 0 to {config.vocab_size - 1}: the ids are of another tokenizer"
        )
    new_id = {old: new for new, old in enumerate(old_ids) if old is not None}
    specials = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        old = getattr(config, name)
        if old is None:
            continue
        if old not in new_id:
            raise CheckpointError(f"{name} of {base} is token {old}, which the new vocabulary leaves out: keep it")
        specials[name] = new_id[old]
    index = torch.tensor([0 if i is None else i for i in old_ids])
    without = torch.tensor([i is None for i in old_ids])

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in reader:
            if name in VOCABULARY_TENSORS:
                rows = tensor[index]
                if without.any():
                    rows[without] = tensor.float().mean(0).to(tensor.dtype)
                tensor = rows
            yield name, tensor

    write_checkpoint(output, replace(config, vocab_size=len(old_ids), **specials), tensors(), extra_files=extra_files)

"""Rows for new vocabulary: the embedding and LM head of a hybrid tokenizer, from those of its base.

RedWhale (arXiv 2408.11294) compares ways to fill the new rows and keeps token decomposition: split the
new piece with the base tokenizer and average the base rows, in the embedding and in the LM head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .checkpoint import EMBEDDING, LM_HEAD, LM_HEAD_BIAS, CheckpointReader, write_checkpoint
from .errors import CheckpointError

InitMethod = Literal["decomposition", "mean", "random"]


def new_rows(
    base_rows: Tensor, decompositions: Sequence[Sequence[int]], method: InitMethod, generator: torch.Generator
) -> Tensor:
    """Initial rows of the new vocabulary entries.

    Args:
        base_rows: [V, H] rows of the base matrix, any floating dtype.
        decompositions: for each new piece, the base token ids that spell it.
        method: "decomposition", mean of the rows of those ids; "mean", mean of all base rows; "random",
            normal with zero mean and the standard deviation of all base entries.
        generator: source of the random method.

    Returns:
        [len(decompositions), H] in the dtype of `base_rows`; computed in fp32, rounded once.
    """
    size = base_rows.shape[1]
    if method == "random":
        std = base_rows.float().std()
        rows = torch.randn(len(decompositions), size, generator=generator) * std
    elif method == "mean":
        rows = base_rows.float().mean(0).expand(len(decompositions), size)
    elif method == "decomposition":
        if any(len(ids) == 0 for ids in decompositions):
            raise CheckpointError("a new piece decomposes into no base token at all")
        ids = torch.tensor([i for ids in decompositions for i in ids], dtype=torch.int64)
        lengths = torch.tensor([len(ids) for ids in decompositions], dtype=torch.int64)
        owner = torch.arange(len(decompositions)).repeat_interleave(lengths)
        rows = torch.zeros(len(decompositions), size).index_add_(0, owner, base_rows[ids].float())
        rows /= lengths[:, None]
    else:
        raise CheckpointError(f"unknown initialisation {method!r}; known: decomposition, mean, random")
    return rows.to(base_rows.dtype)


def extend_checkpoint(
    base: Path,
    output: Path,
    decompositions: Sequence[Sequence[int]],
    *,
    embedding: InitMethod = "decomposition",
    head: InitMethod = "decomposition",
    seed: int = 0,
    extra_files: Sequence[Path] = (),
) -> None:
    """Write `base` with rows for new pieces behind its own, one tensor in memory at a time.

    Args:
        base: Hugging Face checkpoint whose vocabulary ends where the new ids begin.
        output: folder of the new checkpoint.
        decompositions: base token ids of every new piece, in id order.
        embedding, head: how to fill the rows of each matrix; a tied head is the embedding.
        seed: of the random method.
        extra_files: copied into `output`, such as tokenizer files.

    Raises:
        CheckpointError: if a decomposition names an id outside the base vocabulary, or a matrix of the base has
            other rows than its configuration says.
    """
    reader = CheckpointReader(base)
    config = reader.config
    outside = [i for ids in decompositions for i in ids if not 0 <= i < config.vocab_size]
    if outside:
        raise CheckpointError(
            f"a new piece decomposes into token {outside[0]}, but {base} has only tokens 0 to {config.vocab_size - 1}: "
            "the tokenizer's base is not the checkpoint's tokenizer"
        )
    methods: dict[str, InitMethod] = {EMBEDDING: embedding, LM_HEAD: head, LM_HEAD_BIAS: head}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in reader:
            if name == LM_HEAD and config.tie_word_embeddings:
                continue  # a stored copy of the embedding: extended another way, it would untie the two
            if name in methods:
                if len(tensor) != config.vocab_size:
                    raise CheckpointError(
                        f"{name} of {base} has {len(tensor)} rows, its config.json says {config.vocab_size}"
                    )
                # A seed of its own for each matrix, so that file order does not matter.
                generator = torch.Generator().manual_seed(seed * 2 + (name == LM_HEAD))
                rows = new_rows(tensor.view(len(tensor), -1), decompositions, methods[name], generator)
                tensor = torch.cat((tensor, rows.view(-1, *tensor.shape[1:])))
            yield name, tensor

    new_config = replace(config, vocab_size=config.vocab_size + len(decompositions))
    write_checkpoint(output, new_config, tensors(), extra_files=extra_files)

"""Depth up-scaling: a deeper model out of a trained one's layers.

SOLAR 10.7B (Kim et al. 2023, arXiv 2312.15166, section 2) takes two copies of a model with n layers, drops the last m
layers of the first copy and the first m of the second, and puts one upon the other: 2(n − m) layers. From the 32 of
Mistral-7B, with m = 8, it makes 48. The result is worse than its base until it is trained on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from .checkpoint import CheckpointReader, write_checkpoint
from .errors import CheckpointError

_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..+)")

_BESIDE_THE_WEIGHTS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def upscale_checkpoint(
    base: Path,
    output: Path,
    *,
    first: int | None = None,
    last: int | None = None,
    max_shard_bytes: int = 4 * 1024**3,
    on_tensor: Callable[[int], None] | None = None,
) -> None:
    """Write a checkpoint of the first `first` layers of `base`, followed by its last `last`, bit for bit.

    Args:
        base: Hugging Face checkpoint; its tokenizer files are copied along.
        output: the new checkpoint; an existing folder of this name is replaced.
        first, last: layers to take from either end; None is three quarters of the layers, as in SOLAR.
        max_shard_bytes: a new safetensors file begins before this size is passed; memory stays near it.
        on_tensor: called with the bytes of each tensor once it is read.

    Raises:
        CheckpointError: if these layers do not exist or give no deeper model, or if the base lacks some of the
            layers that its configuration promises.
    """
    reader = CheckpointReader(base)
    sources = source_layers(reader.config.num_hidden_layers, first, last)
    rest, layers = _by_layer(reader)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        names = [(name, name) for name in rest]
        for layer, source in enumerate(sources):
            names += [(f"model.layers.{layer}{suffix}", f"model.layers.{source}{suffix}") for suffix in layers[source]]
        for name, source_name in names:
            tensor = reader.tensor(source_name)
            if on_tensor is not None:
                on_tensor(tensor.nbytes)
            yield name, tensor

    write_checkpoint(
        output,
        replace(reader.config, num_hidden_layers=len(sources)),
        tensors(),
        max_shard_bytes=max_shard_bytes,
        extra_files=[path for name in _BESIDE_THE_WEIGHTS if (path := reader.folder / name).is_file()],
    )


def source_layers(layers: int, first: int | None = None, last: int | None = None) -> list[int]:
    """For each layer of the deeper model, the layer of the base that it copies.

    Args:
        layers: of the base.
        first, last: layers to take from either end; None is three quarters of the layers, rounded down.

    Raises:
        CheckpointError: if there are not so many layers, or no more than before would come out.
    """
    first = layers * 3 // 4 if first is None else first
    last = layers * 3 // 4 if last is None else last
    if not (1 <= first <= layers and 1 <= last <= layers):
        raise CheckpointError(
            f"the base has {layers} layers, so the first {first} and the last {last} cannot be taken: "
            f"give numbers from 1 to {layers}"
        )
    if first + last <= layers:
        raise CheckpointError(
            f"the first {first} and the last {last} layers make {first + last}, and the base has {layers} already: "
            "give numbers with a greater sum"
        )
    return [*range(first), *range(layers - last, layers)]


def _by_layer(reader: CheckpointReader) -> tuple[list[str], dict[int, list[str]]]:
    """Names outside the layers, and for each layer the names within it; raises CheckpointError for gaps."""
    rest: list[str] = []
    layers: dict[int, list[str]] = defaultdict(list)
    for name in reader.names():
        match = _LAYER.fullmatch(name)
        if match:
            layers[int(match[2])].append(match[3])
        else:
            rest.append(name)
    promised = set(range(reader.config.num_hidden_layers))
    if set(layers) != promised:
        wrong = sorted(set(layers) ^ promised)
        raise CheckpointError(
            f"{reader.folder} does not fit its own config.json, which says {len(promised)} layers: "
            f"layers {', '.join(map(str, wrong))} are missing or too many"
        )
    complete = {suffix for suffixes in layers.values() for suffix in suffixes}
    missing = [
        f"model.layers.{layer}{suffix}" for layer in sorted(layers) for suffix in sorted(complete - set(layers[layer]))
    ]
    if missing:
        raise CheckpointError(f"{reader.folder} is not complete: missing {', '.join(missing)}")
    return rest, layers

"""Hugging Face checkpoints: `config.json` and safetensors files, read tensor by tensor and written atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic_folder import replacing_folder
from .config import ModelConfig, read_config
from .errors import CheckpointError
from .fp8_base import Fp8Linear
from .llama import Llama
from .lora import LoRALinear
from .phi import build_model
from .rope_layout import RoPELayout, to_half_if_rotated

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
LM_HEAD_BIAS = "lm_head.bias"
VOCABULARY_TENSORS = (EMBEDDING, LM_HEAD, LM_HEAD_BIAS)
"""Tensors with a row, or a number, for every token."""


class CheckpointReader:
    """Lazy access to the tensors of a checkpoint folder, whether one file or sharded.

    Raises:
        CheckpointError: if the folder holds no safetensors, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        if (self.folder / INDEX_NAME).exists():
            self.file_of = _read_index(self.folder / INDEX_NAME)
        elif (self.folder / SINGLE_NAME).exists():
            self.file_of = dict.fromkeys(self._keys(SINGLE_NAME), SINGLE_NAME)
        else:
            raise CheckpointError(f"{self.folder} has neither {SINGLE_NAME} nor {INDEX_NAME}")

    def _open(self, file: str):
        path = self.folder / file
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is named in {INDEX_NAME} but does not exist") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); copy or download it again") from None

    def _keys(self, file: str) -> list[str]:
        with self._open(file) as tensors:
            return list(tensors.keys())

    def names(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self.file_of)

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in."""
        if name not in self.file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        file = self.file_of[name]
        with self._open(file) as tensors:
            if name not in tensors.keys():  # noqa: SIM118 (the handle has no `in`)
                raise CheckpointError(f"{self.folder / file} lacks {name}, which {INDEX_NAME} says it holds")
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """All (name, tensor) pairs, one tensor in memory at a time."""
        for file in sorted(set(self.file_of.values())):
            # Each tensor opens its file anew: pages of a mapping stay in memory until the mapping goes.
            for name in self._keys(file):
                with self._open(file) as tensors:
                    yield name, tensors.get_tensor(name)


def load_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    pad_vocab_to: int = 1,
    rope_layout: RoPELayout = "half",
) -> Llama:
    """Load a checkpoint straight to its device and dtype, holding one extra tensor at a time.

    Args:
        folder: Hugging Face checkpoint of the Llama/Mistral family.
        device: where the weights go.
        dtype: what they become; None keeps the stored one.
        pad_vocab_to: see `Llama`; padding rows are zero.
        rope_layout: order of the rotated rows in the files: "half", that of Hugging Face, or "interleaved", for
            tensors that come from Meta's own files, llama2.c or GGUF. The model, and what it saves, is "half".

    Raises:
        CheckpointError: naming every missing, unexpected or mis-shaped tensor at once, and a head that differs
            from the embedding it is said to be tied to.
    """
    reader = CheckpointReader(folder)
    with torch.device("meta"):
        model = build_model(reader.config, pad_vocab_to=pad_vocab_to)
        expected = {name: tuple(parameter.shape) for name, parameter in build_model(reader.config).named_parameters()}
    rows = model.lm_head.out_features
    loaded: dict[str, Tensor] = {}
    seen = set()
    problems = []
    for name, tensor in reader:
        seen.add(name)
        if name not in expected:
            if name == LM_HEAD and reader.config.tie_word_embeddings:
                # Some tied checkpoints repeat the embedding as head. Dropping one that differs would change the model.
                if EMBEDDING in reader.file_of and not torch.equal(tensor, reader.tensor(EMBEDDING)):
                    problems.append(f"{name} differs from the embedding, the configuration ties them")
            elif not name.endswith("rotary_emb.inv_freq"):  # old checkpoints store the rotary frequencies
                problems.append(f"unexpected {name}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the configuration says {expected[name]}")
        else:
            # A copy even where nothing changes: the mapped file must be free to be replaced.
            if rope_layout == "interleaved":
                tensor = to_half_if_rotated(name, tensor, reader.config)
            tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
            if name in VOCABULARY_TENSORS and rows > len(tensor):
                tensor = torch.cat((tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])))
            loaded[name] = tensor
    problems += [f"missing {name}" for name in expected if name not in seen]
    if problems:
        raise CheckpointError(f"{folder} does not fit its own config.json: {'; '.join(problems)}")
    model.load_state_dict(loaded, strict=False, assign=True)
    if reader.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 4 * 1024**3,
    extra_files: Iterable[Path] = (),
) -> None:
    """Write tensors as a Hugging Face checkpoint; `folder` appears complete or not at all.

    Args:
        folder: target; an existing folder of this name is replaced once the new one is complete.
        config: written as `config.json`, with the dtype of the first tensor.
        tensors: (name, tensor) pairs, taken one by one; memory stays near `max_shard_bytes`.
        max_shard_bytes: a new safetensors file begins before this size is passed.
        extra_files: copied beside the weights, such as tokenizer files.
    """
    with replacing_folder(folder) as staging:
        _write_files(staging, config, tensors, max_shard_bytes, extra_files)


def _write_files(
    staging: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int,
    extra_files: Iterable[Path],
) -> None:
    file_of: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    shard_bytes = total_bytes = shards = 0
    dtype = None

    def flush() -> None:
        nonlocal shard, shard_bytes, shards
        shards += 1
        file = f"part-{shards:05d}"
        save_file(shard, staging / file, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(shard, file))
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and shard_bytes + size > max_shard_bytes:
            flush()
        shard[name] = tensor.detach().cpu().contiguous()
        shard_bytes += size
        total_bytes += size
        dtype = dtype or str(tensor.dtype).removeprefix("torch.")
    if shard:
        flush()

    if shards == 1:
        (staging / "part-00001").rename(staging / SINGLE_NAME)
    else:
        final = {f"part-{i:05d}": f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)}
        for part, file in final.items():
            (staging / part).rename(staging / file)
        weight_map = {name: final[part] for name, part in file_of.items()}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(staging / INDEX_NAME, index)
    _write_json(staging / "config.json", config.to_hf(dtype or "float32"))
    for file in extra_files:
        shutil.copy2(file, staging / Path(file).name)


def save_model(model: Llama, folder: Path, *, extra_files: Iterable[Path] = ()) -> None:
    """Write a model's weights in their present dtype; a tied head is stored once, as the embedding.

    Raises:
        CheckpointError: if the model has LoRA adapters or layers in FP8, which the format has no place for.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise CheckpointError(
            f"{folder} cannot hold LoRA adapters: fold them in with merge_lora before saving, or use save_adapter"
        )
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        raise CheckpointError(f"{folder} cannot hold layers in FP8: put their weights back with Fp8Base.restore")
    vocab_size = model.config.vocab_size
    tensors = (
        (name, parameter[:vocab_size] if name in VOCABULARY_TENSORS else parameter)
        for name, parameter in model.named_parameters()
    )
    write_checkpoint(folder, model.config, tensors, extra_files=extra_files)


def _read_index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); copy or download it again") from None


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

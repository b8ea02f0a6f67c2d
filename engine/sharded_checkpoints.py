"""Checkpoints of several processes, by torch.distributed.checkpoint: each writes its parts, any number reads them.

Tensors are flat in the files; a process' part of one is a chunk of it, so that reading with another number of processes
is reading other chunks. Small state is in `state.json`, as in a checkpoint of one process.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from .checkpoints import TENSORS, CheckpointStore, Wanted, read_state, state_text
from .train_step import TrainStep
from .world import DistributedWorld


class _Chunk:
    """A contiguous part of a flat tensor, in the protocol that torch.distributed.checkpoint has for such objects."""

    def __init__(self, tensor: Tensor, first: int, total: int) -> None:
        self.tensor = tensor.detach().reshape(-1)
        self.first, self.total = first, total

    def size(self) -> torch.Size:
        return torch.Size([self.total])

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.first]), self.tensor.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.tensor.numel() else []

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        if not self.tensor.numel():
            return []
        data = TensorWriteData(self._chunk(), TensorProperties.create_from_tensor(self.tensor), self.size())
        return [WriteItem(MetadataIndex(fqn, [self.first]), WriteItemType.SHARD, tensor_data=data)]


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.tensor if isinstance(found, _Chunk) else super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default's own prepares tensors without content, and drops what it does not know.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.tensor if isinstance(found, _Chunk) else super().lookup_tensor(index)


class ShardedCheckpointStore(CheckpointStore):
    """The checkpoints of a stage that several processes train, each `folder/step-NNNNNNNN/` written by all of them.

    All methods are for all processes to call. Writing is over when `save` returns. The folder must be one that all
    machines share.

    Args:
        folder, keep_last, keep_best: see `CheckpointStore`.
        world: the processes.
        train_step: whose tensors are saved.
    """

    def __init__(
        self, folder: Path, world: DistributedWorld, train_step: TrainStep, *, keep_last: int, keep_best: bool
    ) -> None:
        super().__init__(folder, keep_last=keep_last, keep_best=keep_best)
        self._world, self._train_step = world, train_step

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        wait: bool = False,
    ) -> None:
        """See `CheckpointStore`; `state` is that of the first process.

        Raises:
            OSError: in every process, if one could not write.
        """
        staging, spans = self._staging(step), self._train_step.state_spans()

        def prepare() -> bool:
            if self._path(step).exists():
                return False
            self._make_room()
            staging.mkdir()
            return True

        def publish() -> None:
            self._complete(step, state_text(step, state, score))
            self._prune(step)

        if not self._world.first(prepare):
            return
        objects = {
            key: tensor.detach() if (span := spans[key]) is None else _Chunk(tensor, span.first, span.total)
            for key, tensor in tensors.items()
        }
        try:
            with _quiet():
                save(
                    objects,
                    storage_writer=FileSystemWriter(staging),
                    planner=_SavePlanner(),
                    process_group=self._world.host_group,
                )
        except CheckpointException as failed:
            shutil.rmtree(staging, ignore_errors=True)
            causes = [error for error, _ in failed.failures.values()]
            raise next((error for error in causes if isinstance(error, OSError)), OSError(str(causes[0]))) from failed
        self._world.first(publish)

    def load(
        self,
        step: int | Literal["best"] | None = None,
        wanted: Callable[[int], Mapping[str, Wanted]] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """See `CheckpointStore`; the first process chooses."""

        def choose() -> int | None:
            if step == "best":
                return self._best(self.steps())
            return max(self.steps(), default=None) if step is None else step

        chosen = self._world.first(choose)
        return None if chosen is None else super().load(chosen, wanted)

    def _read(self, path: Path, wanted: Callable[[int], Mapping[str, Wanted]] | None) -> dict[str, Tensor]:
        assert wanted is not None, "a process reads its parts"
        return read_parts(path, wanted(read_state(path)["step"]))


def read_parts(path: Path, wanted: Mapping[str, Wanted]) -> dict[str, Tensor]:
    """What a process needs of a checkpoint, whoever wrote it.

    Args:
        path: folder of one checkpoint.
        wanted: by name.

    Returns:
        By name, in host memory; without those that the checkpoint does not have in this size.
    """
    if (path / TENSORS).exists():
        return _read_safetensors(path / TENSORS, wanted)
    try:
        with _quiet():
            return _read_chunks(path, wanted)
    except (CheckpointException, RuntimeError, EOFError) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        raise OSError(f"{causes[0]}") from None


def _read_chunks(path: Path, wanted: Mapping[str, Wanted]) -> dict[str, Tensor]:
    reader = FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    found, objects = {}, {}
    for name, (like, span) in wanted.items():
        there = saved.get(name)
        size = like.shape if span is None else torch.Size([span.total])
        if not like.numel():
            found[name] = torch.empty(like.shape, dtype=like.dtype)  # nothing to read, and maybe nothing was written
        elif isinstance(there, TensorStorageMetadata) and there.size == size and _dtype(there) == like.dtype:
            found[name] = torch.empty(like.shape, dtype=like.dtype)
            objects[name] = found[name] if span is None else _Chunk(found[name], span.first, span.total)
    load(objects, storage_reader=reader, planner=_LoadPlanner(), no_dist=True)
    return found


def _dtype(metadata: TensorStorageMetadata) -> torch.dtype:
    return metadata.properties.dtype


def _read_safetensors(path: Path, wanted: Mapping[str, Wanted]) -> dict[str, Tensor]:
    found = {}
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name, (like, span) in wanted.items():
            if not like.numel():
                found[name] = torch.empty(like.shape, dtype=like.dtype)
                continue
            if name not in names:
                continue
            rows = file.get_slice(name)
            shape = rows.get_shape()
            if span is None or not shape:
                found[name] = file.get_tensor(name)
            elif math.prod(shape) == span.total:
                width = math.prod(shape[1:])
                begin = span.first // width
                found[name] = rows[begin : begin + like.numel() // width].view(like.shape)
    return found


def _quiet() -> warnings.catch_warnings:
    """Without torch's remarks that one process reads what several wrote."""
    return warnings.catch_warnings(action="ignore")

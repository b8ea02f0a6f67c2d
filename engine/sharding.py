"""A stage's model over several processes, by FSDP2 (`fully_shard`) from outside of the model.

Every process keeps a contiguous part of the rows of each parameter, with its gradient and optimizer state. A layer's
whole parameters exist while it computes. Gradients are summed, not averaged: losses are divided by the target tokens of
the global batch before. (Zhao et al. 2023, arXiv 2304.11277; ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..model import Llama, PackedDocuments, write_checkpoint
from ..model.checkpoint import VOCABULARY_TENSORS
from ..model.lora import adapted_layers
from .errors import RecipeError
from .loop_config import LoopConfig
from .parts import Parts, Span, local_rows
from .selectors import select_parameters
from .stages import Stage
from .update_rules import state_alignment
from .world import DistributedWorld

_SMALL = 2**20
"""Entries up to which a parameter is kept whole where parts of it would not fit the optimizer's state."""


class ShardedModel(Parts):
    """Shares a model between processes, in place, and says what this one holds.

    Kept whole in every process are matrices of which only new rows train, whose gradients are summed over all
    processes at the end of a step, and small parameters whose parts would cut a block of the optimizer's state.

    Args:
        model: the same in every process, with the stage's adapters; a Llama, or a module whose `forward` computes the
            loss.
        stage: what trains, and by which optimizer.
        loop: of the trainer.
        world: the processes, started.
        first_new_row: see `select_parameters`.

    Raises:
        RecipeError: for what only one process can do.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        loop: LoopConfig,
        world: DistributedWorld,
        *,
        first_new_row: int | None = None,
    ) -> None:
        _refuse(stage, loop)
        mesh = world.mesh(loop.replicate)
        assert world.device is not None
        self.model, self.world, self.device = model, world, world.device
        self._group = mesh["shard"].get_group()
        self._shard, self._shards = mesh.get_local_rank("shard"), mesh["shard"].size()
        selected = select_parameters(model, stage.train, first_new_row=first_new_row)
        self._whole = {name for name in selected if self._is_kept_whole(name, selected[name], stage)}
        kept = {name.partition("[")[0] for name in self._whole}
        ignored = {parameter for name, parameter in model.named_parameters() if name in kept}
        for parameter in ignored:
            parameter.data = parameter.data.to(self.device)
        dtype = next(model.parameters()).dtype
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32 if dtype != torch.float32 else None),
            "ignored_params": ignored,
        }
        layers = list(model.model.layers) if isinstance(model, Llama) else []
        for layer in layers:  # one after the other: only one is on the device as a whole
            fully_shard(layer, reshard_after_forward=True, **options)
        # What embeds and predicts is needed at both ends of a step.
        fully_shard(model, reshard_after_forward=False, **options)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        if isinstance(model, Llama):
            register_fsdp_forward_method(model, "loss")

    def settle(self) -> None:
        """Call it once everything that will ever train in the stage requires gradients, before anything else runs.

        FSDP2 decides at the first forward pass in which dtype each layer's gradients are summed, and does not see to
        layers that train later.
        """
        if isinstance(self.model, Llama):
            ids = torch.zeros(1, dtype=torch.int64, device=self.device)
            self.model.eval()
            with torch.no_grad():
                self.model(ids, PackedDocuments.from_lengths([1], self.device))
        self.rest()

    def rest(self) -> None:
        """Give up whole parameters that a forward pass without a backward pass has left."""
        for module in self._modules:
            module.reshard()

    # What the optimizer asks.

    @torch.no_grad()
    def local(self, tensor: Tensor) -> Tensor:
        """See `Parts`."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def span(self, name: str, parameter: Tensor) -> Span:
        """See `Parts`."""
        total = parameter.numel()
        if name in self._whole:
            return Span(0, total)
        return Span(self._first_row(parameter.shape[0]) * (total // parameter.shape[0]), total)

    def takes_buffer(self, name: str) -> bool:
        """See `Parts`: FSDP2 sums up what is in `.grad`."""
        return name in self._whole

    def is_summed(self, name: str) -> bool:
        """See `Parts`."""
        return name not in self._whole

    def sum_(self, gradient: Tensor) -> None:
        """See `Parts`."""
        self.world.sum_(gradient)

    def norms(self, names: Sequence[str], norms: Tensor) -> Tensor:
        """See `Parts`."""
        squares = norms.double().square()
        if self._shard:  # what is whole everywhere counts once
            whole = torch.tensor([name in self._whole for name in names])
            squares = squares.masked_fill(whole.to(squares.device, non_blocking=True), 0.0)
        dist.all_reduce(squares, group=self._group)
        return squares.sqrt().float()

    def _first_row(self, rows: int) -> int:
        return min(self._shard * local_rows(rows, self._shards), rows)

    def _is_kept_whole(self, name: str, parameter: Tensor, stage: Stage) -> bool:
        if name.endswith("]"):
            return True
        rows, entries = parameter.shape[0], parameter.numel()
        kept = local_rows(rows, self._shards)
        if kept == rows or kept * (entries // rows) % state_alignment(stage) == 0:
            return False
        if entries <= _SMALL:
            return True
        raise RecipeError(
            f"stage {stage.name!r}: {self._shards} parts of {name} ({' × '.join(map(str, parameter.shape))}) would cut "
            f"blocks of {state_alignment(stage)} entries that {stage.optimizer} keeps together: choose another number "
            'of processes, or optimizer = "adamw"'
        )

    # Whole tensors.

    def gathered(self, local: Tensor, total: int) -> Tensor:
        """A flat tensor of `total` entries that all processes hold parts of, whole on the device; for all to call."""
        size = torch.tensor(local.numel())
        dist.all_reduce(size, dist.ReduceOp.MAX, group=self.world.host_group)  # the first ones' parts are the longest
        padded = torch.zeros(int(size), dtype=local.dtype, device=local.device)
        padded[: local.numel()] = local.reshape(-1)
        whole = torch.empty(int(size) * self._shards, dtype=local.dtype, device=local.device)
        # As bytes: not every backend sends every type.
        pieces = list(whole.view(torch.uint8).chunk(self._shards))
        dist.all_gather(pieces, padded.view(torch.uint8), group=self._group)
        return whole[:total]

    def whole(self, parameter: Tensor) -> Tensor:
        """A parameter as one tensor, in every process; for all to call."""
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        return self.gathered(self.local(parameter.detach()), parameter.numel()).view(parameter.shape)

    def state_tensors(self, tensors: dict[str, Tensor], spans: dict[str, Span | None]) -> dict[str, Tensor]:
        """State of whole parameters, in the first process' host memory; empty in others. For all to call."""
        whole = {}
        for key, tensor in tensors.items():
            span = spans[key]
            if span is not None and tensor.dim() and key.partition(".")[2] not in self._whole:
                rows = tensor.shape[1:] if tensor.dim() > 1 else ()
                tensor = self.gathered(tensor, span.total if tensor.numel() else 0).view(-1, *rows)
            if self.world.is_first:
                whole[key] = tensor.cpu()
        return whole

    def adapters(self) -> dict[str, Tensor]:
        """The adapters' matrices by name, in the first process' host memory; empty in others. For all to call."""
        self.rest()
        names = {name for layer in adapted_layers(self.model) for name in (f"{layer}.lora_A", f"{layer}.lora_B")}
        found = {}
        for name, parameter in self.model.named_parameters():
            if name in names:
                whole = self.whole(parameter)
                if self.world.is_first:
                    found[name] = whole.cpu()
        return found

    @torch.no_grad()
    def fold_lora(self) -> None:
        """Add every adapter to its weight, computed in fp32 and rounded once; its output counts no more from then on.

        The adapters' matrices stay as they are, for a state that is saved later.
        """
        self.rest()
        for layer in adapted_layers(self.model).values():
            weight = self.local(layer.weight)
            delta = self.local(layer.lora_B).float() @ self.whole(layer.lora_A).float()
            weight.copy_((weight.float() + layer.scale * delta).to(weight.dtype))
            layer.scale = 0.0

    def save(self, folder: Path, *, extra_files: Iterable[Path] = ()) -> None:
        """Write the model, without adapters, as `save_model` does; for all to call, the first one writes."""
        self.rest()
        if self.world.is_first:
            assert isinstance(self.model, Llama), "other models are for their own code to save"
            write_checkpoint(folder, self.model.config, self._tensors(), extra_files=extra_files)
        else:
            for _ in self._tensors():
                pass
        self.world.first(lambda: None)  # nobody goes on before it is there

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        assert isinstance(self.model, Llama)
        rows = self.model.config.vocab_size
        for name, parameter in self.model.named_parameters():
            if not name.endswith((".lora_A", ".lora_B")):
                whole = self.whole(parameter)
                yield name, whole[:rows] if name in VOCABULARY_TENSORS else whole


def _refuse(stage: Stage, loop: LoopConfig) -> None:
    """Raise RecipeError for what only one process can do."""
    if stage.optimizer.startswith("bnb_"):
        raise RecipeError(
            f"stage {stage.name!r}: {stage.optimizer} cannot share its state between processes: choose "
            'optimizer = "adamw_8bit" or "adamw"'
        )
    if loop.compile:
        raise RecipeError("compile = true is for one process alone: leave it out")
    if loop.activations == "offload":
        raise RecipeError('activations = "offload" is for one process alone: choose "full" or "recompute-cheap"')
    if loop.frozen != "stored":
        raise RecipeError(f'frozen = "{loop.frozen}" is for one process alone: leave it out')

"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import RecipeError, StoppedElsewhere

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import ProcessGroup, Store, Work

_Result = TypeVar("_Result")
_FAILED = "failed"
_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
"""What any process may be late in training."""
_PATIENCE = datetime.timedelta(days=100)
"""The same for what the first process does alone: a step of a run may take days. A process that ends is noticed at
once."""


class World:
    """One process that works alone; `DistributedWorld` is that of several. Steps and trainer ask it who does what."""

    rank = 0
    size = 1
    device: torch.device | None = None
    """Of this process, once `start` has said so; None for the one that a model is on."""

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once: other steps, metrics, reports."""
        return self.rank == 0

    @property
    def failed(self) -> bool:
        """Whether a process has told of an error."""
        return False

    def start(self, device: torch.device) -> torch.device:
        """The device of this process, where a recipe means `device`; opens the connections between the processes."""
        return device

    def first(self, work: Callable[[], _Result]) -> _Result:
        """Let the first process do something while the others wait, however long it takes.

        Args:
            work: its result must be one that pickle can send.

        Returns:
            What it returned, in every process.

        Raises:
            StoppedElsewhere: in the others, if it raised something in the first.
        """
        return work()

    def agree(self, number: Callable[[], int]) -> Callable[[], int]:
        """Begin to compare a number of all processes; what is returned gives the largest when it is called."""
        return number

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        return tensor

    def fail(self, message: str, code: int) -> bool:
        """Tell the others that this process ends with an exit code; returns whether it is the first to say why."""
        return True

    def close(self) -> None:
        """End what the processes share."""


class DistributedWorld(World):
    """The processes that torchrun, or anything else that sets its environment variables, has started.

    Args:
        store: that all processes reach.
        rank, size: number of this process, from 0, and of all of them.
        local_rank: number of this process on its machine, which is that of its GPU.
    """

    def __init__(self, store: Store, rank: int, size: int, local_rank: int) -> None:
        self._store, self.rank, self.size, self.local_rank = store, rank, size, local_rank
        self.host_group: ProcessGroup | None = None
        """Of all processes, for what is in host memory."""
        self._patient_group: ProcessGroup | None = None

    @classmethod
    def of_environment(cls) -> DistributedWorld:
        """Find the other processes by the environment."""
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(iter(rendezvous("env://", timeout=_COLLECTIVE_TIMEOUT)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        return cls(PrefixStore(f"redwhale/{attempt}", store), rank, size, local_rank)

    def start(self, device: torch.device) -> torch.device:
        """See `World`: the GPU with this process' number, or the CPU.

        Raises:
            RecipeError: for a GPU by its number, and for more processes than GPUs.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore

        if device.type == "cuda":
            if device.index is not None:
                raise RecipeError(f'device = "{device}" is one GPU for {self.size} processes: write "cuda" or "auto"')
            if self.local_rank >= torch.cuda.device_count():
                raise RecipeError(
                    f"there is no GPU for process {self.local_rank} of this machine, which has "
                    f"{torch.cuda.device_count()}: start as many processes with --nproc-per-node"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=_COLLECTIVE_TIMEOUT,
                **options,
            )
        if self.host_group is None:
            self.host_group = cast("ProcessGroup", dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT))
            self._patient_group = cast("ProcessGroup", dist.new_group(backend="gloo", timeout=_PATIENCE))
        self.device = device
        return device

    def mesh(self, replicate: int) -> DeviceMesh:
        """The processes as FSDP2 wants them: [replicate, size / replicate], dimensions "replicate" and "shard".

        Raises:
            RecipeError: if the processes cannot be divided so.
        """
        from torch.distributed.device_mesh import init_device_mesh

        assert self.device is not None, "start it first"
        if self.size % replicate:
            raise RecipeError(f"replicate = {replicate} must divide the {self.size} processes of this run")
        if replicate == 1:
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        shape = (replicate, self.size // replicate)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def first(self, work: Callable[[], _Result]) -> _Result:
        """See `World`."""
        import torch.distributed as dist

        results: list[Any] = [work() if self.is_first else None]
        try:
            dist.broadcast_object_list(results, src=0, group=self._patient_group)
        except RuntimeError:  # the connection went with the first process
            if self.failed:
                raise StoppedElsewhere(int(self._store.get(_FAILED))) from None
            raise
        return results[0]

    def agree(self, number: Callable[[], int]) -> Callable[[], int]:
        """See `World`; neither waits for a GPU."""
        import torch
        import torch.distributed as dist

        largest = torch.tensor(number())
        work: Work | None = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.host_group, async_op=True)

        def result() -> int:
            if work is not None:
                work.wait()
            return int(largest)

        return result

    def sum_(self, tensor: Tensor) -> Tensor:
        """See `World`; on a GPU it is only queued."""
        import torch.distributed as dist

        dist.all_reduce(tensor, group=self.host_group if tensor.device.type == "cpu" else None)
        return tensor

    def fail(self, message: str, code: int) -> bool:
        """See `World`."""
        try:
            self._store.set(_FAILED, str(code))
            return self._store.add(f"said/{message}", 1) == 1
        except RuntimeError:
            return True

    @property
    def failed(self) -> bool:
        """See `World`."""
        try:
            return self._store.check([_FAILED])
        except RuntimeError:
            return True

    def close(self) -> None:
        """See `World`."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = World()
"""Of a run of one process."""


_joined: World = ALONE


def join() -> World:
    """Find the other processes that torchrun started, if it did."""
    global _joined  # noqa: PLW0603
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        _joined = DistributedWorld.of_environment()
    return _joined


def current() -> World:
    """What `join` has found in this process."""
    return _joined

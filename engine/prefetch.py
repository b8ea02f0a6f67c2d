"""Batches read, collated and pinned in the background while the device computes."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator

import torch

from .batches import Batch, BatchLoader


def prefetched(loader: BatchLoader, steps: range, depth: int = 2) -> Generator[tuple[int, list[Batch]], None, None]:
    """The micro-batches of some steps, prepared by a thread up to `depth` steps ahead.

    For a GPU the thread leaves them in pinned memory and the consumer starts the copies on its own current stream,
    which waits for nothing. Close the iterator (`contextlib.closing`) to end the thread before the last step.

    Args:
        loader: whose micro-batches.
        steps: which, in order.
        depth: steps that wait prepared at most.

    Yields:
        (step, micro-batches on the loader's device).

    Raises:
        What the loader raises in the thread, at the step where it did.
    """
    prepared: queue.SimpleQueue[tuple[int, list[Batch]] | BaseException | None] = queue.SimpleQueue()
    free = threading.Semaphore(depth)
    closed = threading.Event()
    on_gpu = loader.device.type == "cuda"

    def prepare() -> None:
        try:
            # Else pinning would open a context on the first GPU for every rank.
            with torch.cuda.device(loader.device) if on_gpu else contextlib.nullcontext():
                for step in steps:
                    free.acquire()
                    if closed.is_set():
                        return
                    batches = loader.host_micro_batches(step)
                    prepared.put((step, [batch.pin_memory() for batch in batches] if on_gpu else batches))
            prepared.put(None)
        except BaseException as error:
            prepared.put(error)

    thread = threading.Thread(target=prepare, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := prepared.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            free.release()
            step, batches = item
            yield step, [batch.to(loader.device) for batch in batches]
    finally:
        closed.set()
        free.release()
        thread.join()

import contextlib
import threading
import time

import numpy as np
import pytest
import torch

from redwhale.engine.batches import BatchLoader, TokenSequence
from redwhale.engine.prefetch import prefetched


class Counting:
    """Ten sequences of three tokens; notes what was read and fails at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.read: list[int] = []
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 10

    def sequence(self, index: int) -> TokenSequence:
        if index == self.fails_at:
            raise OSError("the disk is gone")
        self.read.append(index)
        ids = np.full(3, index)
        return TokenSequence(ids, ids, [3])


def loader_of(source, **options) -> BatchLoader:
    return BatchLoader(source, batch_size=2, micro_batch_size=1, seed=0, **options)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def settled(source: Counting) -> int:
    """Sequences read once the thread reads no more."""
    while True:
        before = len(source.read)
        time.sleep(0.05)
        if len(source.read) == before:
            return before


def test_steps_come_in_order_with_the_loaders_own_batches():
    loader = loader_of(Counting())
    found = list(prefetched(loader, range(3, 20)))
    assert [step for step, _ in found] == list(range(3, 20))
    for step, batches in found:
        expected = loader.micro_batches(step)
        assert [batch.input_ids.tolist() for batch in batches] == [batch.input_ids.tolist() for batch in expected]
    assert prefetch_threads() == []


def test_no_steps_are_no_batches():
    assert list(prefetched(loader_of(Counting()), range(4, 4))) == []
    assert prefetch_threads() == []


@pytest.mark.parametrize("depth", [1, 3])
def test_the_thread_works_ahead_as_far_as_it_may_and_no_further(depth):
    source = Counting()
    with contextlib.closing(prefetched(loader_of(source), range(100), depth)) as batches:
        next(batches)
        assert settled(source) == 2 * (1 + depth)
        next(batches)
        assert settled(source) == 2 * (2 + depth)


def test_an_exception_arrives_at_its_step_behind_the_steps_before_it():
    source = Counting()
    order = [index for step in range(5) for index in loader_of(source).indices(step)]
    failing = loader_of(Counting(fails_at=order[7]))
    batches = prefetched(failing, range(5))
    assert [next(batches)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert prefetch_threads() == []


def test_closing_early_leaves_no_thread():
    batches = prefetched(loader_of(Counting()), range(10**9))
    next(batches)
    assert len(prefetch_threads()) == 1
    batches.close()
    assert prefetch_threads() == []


def test_an_exception_of_the_consumer_leaves_no_thread():
    def consume() -> None:
        with contextlib.closing(prefetched(loader_of(Counting()), range(10**9))) as batches:
            for step, _ in batches:
                1 // (2 - step)

    with pytest.raises(ZeroDivisionError):
        consume()
    assert prefetch_threads() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_the_gpu_with_the_same_content():
    expected = loader_of(Counting())
    for step, batches in prefetched(loader_of(Counting(), device="cuda"), range(200), depth=4):
        for batch, host in zip(batches, expected.micro_batches(step), strict=True):
            assert batch.input_ids.is_cuda
            assert batch.documents.position_ids.is_cuda
            assert batch.documents.cu_seqlens.is_cuda
            assert torch.equal(batch.input_ids.cpu(), host.input_ids)
            assert torch.equal(batch.targets.cpu(), host.targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_consumer_waits_for_no_copy():
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in prefetched(loader_of(Counting(), device="cuda"), range(20)):
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")

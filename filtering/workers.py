"""An ordered map over work in processes of this machine, with a bounded number of inputs in flight."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

from .errors import CorpusError

Input = TypeVar("Input")
Output = TypeVar("Output")


class Mapper(Protocol):
    """Yields `function(input)` for every input, in input order, wherever it is computed."""

    def __call__(self, function: Callable[[Any], Any], inputs: Iterable[Any]) -> Generator[Any, None, None]: ...


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """A context manager around `count` spawned processes, or none where one is enough; made when first needed.

    The processes end with the context, and when this process dies.
    """

    def __init__(self, count: int):
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def map(self, function: Callable[[Input], Output], inputs: Iterable[Input]) -> Generator[Output, None, None]:
        """Yields `function(input)` in input order; `function` must be importable by name.

        At most twice as many inputs and outputs as processes are held at a time. Raises CorpusError when one of the
        processes dies.
        """
        if self._count == 1:
            yield from map(function, inputs)
            return
        if self._pool is None:
            # A forked child of a process with threads (torch starts some) can deadlock; a spawned one starts clean.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, mp_context=context, initializer=_start_worker)
        pending: deque[Future[Output]] = deque()
        try:
            for item in inputs:
                pending.append(self._pool.submit(function, item))
                if len(pending) >= 2 * self._count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise CorpusError(
                "a filter worker process died, out of memory or because the calling script starts its work without "
                "`if __name__ == '__main__':`; add that line, or set workers = 1"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def ordered_map(
    function: Callable[[Input], Output], inputs: Iterable[Input], workers: int
) -> Generator[Output, None, None]:
    """Yields `function(input)` in input order by `Workers` of its own."""
    with Workers(workers) as pool:
        yield from pool.map(function, inputs)


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides when the workers end.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

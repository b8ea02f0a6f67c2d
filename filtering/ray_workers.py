"""The maps of `workers` on a Ray cluster, by Ray Data; what a function reads and writes, every machine must reach."""

import contextlib
import logging
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from .errors import CorpusError

Input = TypeVar("Input")
Output = TypeVar("Output")


class RayWorkers:
    """A context manager around a Ray cluster: the running one, or one of `count` processes on this machine.

    What it started it stops. What machines that die had in work is done again on others. Raises CorpusError when ray is
    not installed.
    """

    def __init__(self, count: int):
        try:
            import ray
            import ray.data
            import ray.util.scheduling_strategies
        except ImportError as error:
            raise CorpusError('engine = "ray" needs ray: pip install "redwhale[scale]"') from error
        self._ray: Any = ray
        self._count = count
        self._own = False

    def __enter__(self) -> "RayWorkers":
        if not self._ray.is_initialized():
            try:
                self._ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
            except ConnectionError:
                self._ray.init(
                    num_cpus=self._count, include_dashboard=False, logging_level="ERROR", log_to_driver=False
                )
            self._own = True
        return self

    def __exit__(self, *exc: object) -> None:
        if self._own:
            self._ray.shutdown()

    def map(self, function: Callable[[Input], Output], inputs: Iterable[Input]) -> Generator[Output, None, None]:
        """Yields `function(input)` in input order; all inputs are listed first, so they should be small."""
        yield from self.flat_map(lambda item: iter((function(item),)), inputs)

    def everywhere(self, function: Callable[[Input], object], item: Input) -> None:
        """Calls `function(item)` once on every machine that is there; a machine that dies meanwhile is left out."""
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        call = self._ray.remote(function)
        for node in self._ray.nodes():
            if node["Alive"]:
                with contextlib.suppress(self._ray.exceptions.RayError):
                    placed = strategy(node["NodeID"], soft=False)
                    self._ray.get(call.options(num_cpus=0, scheduling_strategy=placed).remote(item))

    def flat_map(
        self, function: Callable[[Input], Iterator[Output]], inputs: Iterable[Input]
    ) -> Generator[Output, None, None]:
        """Yields what `function(input)` yields, of one input after the other, in input order.

        A function may run twice for an input, of which one is used: it must give the same each time. All inputs are
        listed first, so they should be small; outputs wait in Ray's object store, of which Ray Data bounds the use.
        """
        rows = [{"item": pickle.dumps(item)} for item in inputs]
        if not rows:
            return
        context = self._ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)

        def apply(batch: Any) -> Iterator[Any]:
            import pyarrow as pa

            def row(result: object) -> Any:
                return pa.table({"result": pa.array([pickle.dumps(result)], pa.large_binary())})

            try:
                for item in batch.column("item").to_pylist():
                    for result in function(pickle.loads(item)):
                        yield row(result)
            except CorpusError as error:  # what Ray raises in its place would hide it
                yield row(error)

        dataset = self._ray.data.from_items(rows, override_num_blocks=len(rows))
        for row in dataset.map_batches(apply, batch_size=1, batch_format="pyarrow").iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, CorpusError):
                raise result
            yield result

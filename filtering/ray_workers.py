"""The map of `workers` on a Ray cluster, by Ray Data; every machine sees the input and output folders by one path."""

import logging
import pickle
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from .errors import CorpusError

Input = TypeVar("Input")
Output = TypeVar("Output")


class RayWorkers:
    """A context manager around a Ray cluster: the running one, or one of `count` processes on this machine.

    What it started it stops. Raises CorpusError when ray is not installed.
    """

    def __init__(self, count: int):
        try:
            import ray
            import ray.data
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
        rows = [{"item": pickle.dumps(item)} for item in inputs]
        if not rows:
            return
        context = self._ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)

        def apply(row: dict[str, bytes]) -> dict[str, bytes]:
            try:
                result = function(pickle.loads(row["item"]))
            except CorpusError as error:  # what Ray raises in its place would hide it
                result = error
            return {"result": pickle.dumps(result)}

        dataset = self._ray.data.from_items(rows, override_num_blocks=len(rows)).map(apply)
        for row in dataset.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, CorpusError):
                raise result
            yield result

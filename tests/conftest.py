"""Settings for all tests."""

import os

# The tests' models are far too small to share among threads: waiting for each other would take most of the
# time. Set before torch is imported, and inherited by the commands that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import fcntl
import gc
from collections.abc import Iterator

import pytest
import torch

# Where there is no GPU, Triton kernels run in Triton's interpreter, which has to be asked for before they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def no_old_objects_for_the_garbage_collector() -> None:
    """Training asks the collector to go through everything; what earlier modules imported need not be part of that."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def no_other_cluster(tmp_path_factory) -> Iterator[None]:
    """Ray takes any cluster that runs on the machine, so tests in several processes have theirs one after the other."""
    with open(tmp_path_factory.getbasetemp().parent / "ray.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

"""Settings for all tests."""

import os

# The tests' models are far too small to share among threads: waiting for each other would take most of the
# time. Set before torch is imported, and inherited by the commands that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import gc

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

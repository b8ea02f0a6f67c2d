"""Settings for all tests."""

import os

# The tests' models are far too small to share among threads: waiting for each other would take most of the
# time. Set before torch is imported, and inherited by the commands that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Where there is no GPU, Triton kernels run in Triton's interpreter, which has to be asked for before they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

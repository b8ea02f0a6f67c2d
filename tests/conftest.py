"""Settings for all tests."""

import os

# The tests' models are far too small to share among threads: waiting for each other would take most of the
# time. Set before torch is imported, and inherited by the commands that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

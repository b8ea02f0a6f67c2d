"""The command line, for `torchrun`, in a process that kills itself at a chosen moment of each attempt.

`DEATHS` in the environment is JSON: for each attempt of torchrun [RANK, MOMENT, COUNT], the process with this number
being killed when MOMENT comes for the COUNT-th time: "step" (gradients are there, and one weight is updated), "write"
(within the write of its part of a saved state) or "name" (all parts are written, and the state has no name yet).
"""

import json
import os
import signal
import sys

from redwhale.engine import sharded_checkpoints, update_rules
from redwhale.engine.checkpoints import CheckpointStore
from redwhale.engine.cli import main


def die_within(owner: object, method: str, count: int) -> None:
    original, calls = getattr(owner, method), iter(range(1, 10**9))

    def dying(*args, **kwargs):
        result = original(*args, **kwargs) if method != "_complete" else None
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs) if method == "_complete" else result

    setattr(owner, method, dying)


if __name__ == "__main__":
    deaths = json.loads(os.environ["DEATHS"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt < len(deaths):
        rank, moment, count = deaths[attempt]
        places = {
            "step": (update_rules.AdamW, "_fused"),
            "write": (sharded_checkpoints._SavePlanner, "resolve_data"),
            "name": (CheckpointStore, "_complete"),
        }
        if int(os.environ["RANK"]) == rank:
            die_within(*places[moment], count)
    sys.exit(main(sys.argv[1:]))

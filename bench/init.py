"""Memory and time of extending a checkpoint of SOLAR-10.7B's shape by new rows, the model never being loaded.

Random weights of SOLAR's width, vocabulary and --layers layers are written to a temporary folder; a fresh process for
each method then adds --new-rows rows and reports its peak resident memory. Layers are copied one tensor at a time, so
the peak does not depend on their number once a shard is full; 48 is the real size and needs 45 GB of disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from common import parser, write_result

PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
from redwhale.model import NewVocabulary, RowFinish, extend_checkpoint
base, output, method, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
generator = torch.Generator().manual_seed(0)
ids = torch.randint(3, 32_000, (count, 4), generator=generator).tolist()
began = time.perf_counter()
finish = RowFinish(break_collisions=0.02)
extend_checkpoint(base, output, NewVocabulary(ids), embedding=method, head=method, finish=finish)
seconds = time.perf_counter() - began
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(json.dumps({"peak_bytes": peak, "seconds": seconds}))
"""


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "init")
    arguments.add_argument("--layers", type=int, default=48, help="of 48 (default: %(default)s)")
    arguments.add_argument("--new-rows", type=int, default=17_072, help="RedWhale's number by default")
    arguments.add_argument("--methods", nargs="+", default=["decomposition", "multivariate"])
    options = arguments.parse_args()

    import torch

    from redwhale.model import create_checkpoint, parameter_count, preset

    config = replace(preset("solar-10.7b"), num_hidden_layers=options.layers)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        create_checkpoint(config, base, dtype=torch.bfloat16, max_shard_bytes=1 << 30)
        for method in options.methods:
            command = [sys.executable, "-c", PROGRAM, str(base), str(Path(scratch) / "out"), method]
            output = subprocess.run([*command, str(options.new_rows)], check=True, capture_output=True, text=True)
            results.append({"method": method, **json.loads(output.stdout.splitlines()[-1])})
            print(results[-1], flush=True)
    found = {
        "layers": options.layers,
        "parameters": parameter_count(config),
        "new_rows": options.new_rows,
        "results": results,
    }
    write_result(options.result, __file__, found)


if __name__ == "__main__":
    main()

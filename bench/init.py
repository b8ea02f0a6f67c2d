"""Memory and time of extending a checkpoint of SOLAR-10.7B's shape by new rows, the model never being loaded.

Random weights of SOLAR's width, vocabulary and --layers layers, which repeat one layer's, are written to a temporary
folder; a fresh process for each method then adds --new-rows rows and reports its peak resident memory and its CPU time
beside the time on the clock, which other processes and the disk have a part in. 48 layers are the real size and need
45 GB of disk.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from common import parser, write_result

from redwhale.model import ModelConfig, parameter_count, parameter_shapes, preset, write_checkpoint

PROGRAM = """
import json, resource, sys, time
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
usage = resource.getrusage(resource.RUSAGE_SELF)
cpu_seconds = usage.ru_utime + usage.ru_stime
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(json.dumps({"peak_bytes": peak, "seconds": seconds, "cpu_seconds": cpu_seconds}))
"""


def write_base(config: ModelConfig, folder: Path) -> None:
    """A checkpoint of random weights, whose layers are all alike; drawing each would take longer than copying it."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in parameter_shapes(config).items():
            kind = re.sub(r"layers\.\d+", "layers", name)
            if kind not in made:
                made[kind] = (torch.randn(shape, generator=generator) * config.initializer_range).bfloat16()
            # A copy: a file cannot hold the same memory under two names.
            yield name, made[kind].clone()

    write_checkpoint(folder, config, tensors(), max_shard_bytes=1 << 30)


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "init")
    arguments.add_argument("--layers", type=int, default=48, help="of 48 (default: %(default)s)")
    arguments.add_argument("--new-rows", type=int, default=17_072, help="RedWhale's number by default")
    arguments.add_argument("--methods", nargs="+", default=["decomposition", "multivariate"])
    options = arguments.parse_args()

    config = replace(preset("solar-10.7b"), num_hidden_layers=options.layers)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        base, output = Path(scratch) / "base", Path(scratch) / "out"
        write_base(config, base)
        size = sum(path.stat().st_size for path in base.iterdir())
        for method in options.methods:
            command = [sys.executable, "-c", PROGRAM, str(base), str(output), method, str(options.new_rows)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append({"method": method, **json.loads(printed.splitlines()[-1])})
            print(results[-1], flush=True)
            shutil.rmtree(output)
    found = {
        "layers": options.layers,
        "parameters": parameter_count(config),
        "checkpoint_bytes": size,
        "new_rows": options.new_rows,
        "results": results,
    }
    write_result(options.result, __file__, found)


if __name__ == "__main__":
    main()

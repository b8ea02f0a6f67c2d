"""Speed of the filter with one worker and with all cores, what it keeps of each source, and the parent's memory.

Every pass runs in a process of its own, so that no pass finds memory or caches that another left; starting the workers
counts. CPU time is that of all processes of a pass; wall time is that of the machine as busy as it was. The inputs
should hold well over 16 MiB of text: below that the filter takes one process whatever it is told.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from common import parser, peak_memory_mb, write_result

from redwhale.filtering import FilterConfig, filter_corpus, find_inputs
from redwhale.filtering.workers import available_cores


def fresh_process(inputs: list[str], workers: int) -> dict[str, Any]:
    """`one_pass` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(one_pass, inputs, workers).result()


def one_pass(inputs: list[str], workers: int) -> dict[str, Any]:
    """Filter into a folder that is thrown away; seconds, this process's peak memory in MB, and the summary."""
    with tempfile.TemporaryDirectory() as output:
        began, began_cpu = time.perf_counter(), sum(os.times()[:4])
        summary = filter_corpus(FilterConfig(inputs=inputs, workers=workers), Path(output))
        seconds, cpu_seconds = time.perf_counter() - began, sum(os.times()[:4]) - began_cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_memory_mb": peak_memory_mb(),
        "summary": msgspec.to_builtins(summary),
    }


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "filter_speed")
    arguments.add_argument("inputs", nargs="+", type=Path, help="files and folders of raw Korean text")
    arguments.add_argument("--passes", type=int, default=3, help="for each number of workers (default: %(default)s)")
    given = arguments.parse_args()
    inputs = [str(path) for path in given.inputs]
    files = find_inputs(inputs)

    counts = sorted({1, available_cores()})
    passes: dict[int, list[dict[str, Any]]] = {workers: [] for workers in counts}
    for _ in range(given.passes):
        for workers in counts:
            passes[workers].append(fresh_process(inputs, workers))
            print(f"{workers} workers: {passes[workers][-1]['seconds']:.1f} s")

    summary = passes[1][0]["summary"]
    assert all(done["summary"] == summary for some in passes.values() for done in some), "passes differ in their result"
    speeds = []
    for workers, done in passes.items():
        seconds = statistics.median(one["seconds"] for one in done)
        cpu_seconds = statistics.median(one["cpu_seconds"] for one in done)
        peaks = [one["peak_memory_mb"] for one in done if one["peak_memory_mb"] is not None]
        speeds.append(
            {
                "workers": workers,
                "median_seconds": round(seconds, 2),
                "seconds": [round(one["seconds"], 2) for one in done],
                "mb_per_second": round(summary["bytes_in"] / 1e6 / seconds, 2),
                "median_cpu_seconds": round(cpu_seconds, 2),
                "mb_per_cpu_second": round(summary["bytes_in"] / 1e6 / cpu_seconds, 2),
                "peak_memory_of_parent_mb": round(max(peaks), 1) if peaks else None,
            }
        )
        print(f"{workers} workers: {speeds[-1]['mb_per_cpu_second']} MB of text per second of CPU time")
    sources = {
        name: {**counts, "kept": round(counts["documents_out"] / counts["documents_in"], 4)}
        for name, counts in summary["sources"].items()
    }
    write_result(
        given.result,
        __file__,
        {
            "files": [path.name for path in files],
            "file_bytes": sum(path.stat().st_size for path in files),
            "text_bytes": summary["bytes_in"],
            "documents_in": summary["documents_in"],
            "documents_out": summary["documents_out"],
            "broken_records": summary["broken_records"],
            "speeds": speeds,
            "sources": sources,
            "dropped_documents": {rule["name"]: rule["dropped_documents"] for rule in summary["rules"]},
        },
        data=given.inputs,
    )


if __name__ == "__main__":
    main()

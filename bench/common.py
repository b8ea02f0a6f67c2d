"""What the scripts here share: they describe the machine and write bench/results/NAME.json, all in one form."""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "bench" / "results"
_PACKAGES = (
    *("redwhale", "torch", "triton", "sentencepiece", "numpy", "pyarrow", "tokenizers", "transformers"),
    *("peft", "liger-kernel", "cut-cross-entropy", "bitsandbytes", "duckdb", "datatrove", "datasketch", "rensa"),
)


def machine() -> dict[str, Any]:
    """CPU model, the cores that this process may use, memory in GiB, and whether the CPU multiplies bf16."""
    model, flags = platform.processor(), []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = value.split()
    return {
        "cpu": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "bf16_instructions": [flag for flag in flags if flag in ("avx512_bf16", "amx_bf16")],
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def parser(description: str | None, result: str) -> argparse.ArgumentParser:
    """A command line with `--result`, the name of the file to write, which every script takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--result", default=result, help="writes bench/results/RESULT.json (default: %(default)s)")
    return made


def shown_command(script: str, paths: Sequence[Path], arguments: Sequence[str]) -> str:
    """The command line with DATA for the folder that holds all `paths` outside the project.

    Paths in the project are shown relative to it, files of installed packages and paths with nothing in common by their
    last part.
    """
    inputs = {path.resolve() for path in paths}
    packaged = {path for path in inputs if "site-packages" in path.parts}
    outside = [path for path in inputs - packaged if not path.is_relative_to(PROJECT)]
    folders = [path.parent if path.is_file() else path for path in outside]
    common = Path(os.path.commonpath(folders or ["/"]))
    shown = []
    for argument in arguments:
        name, separator, value = argument.rpartition("=")
        path = Path(value).resolve()
        if path in inputs and path.is_relative_to(PROJECT):
            value = path.relative_to(PROJECT).as_posix()
        elif path in inputs:
            alone = path in packaged or len(common.parts) < 2
            value = (Path("DATA") / (path.name if alone else path.relative_to(common))).as_posix()
        shown.append(name + separator + value)
    return shlex.join(["python", script, *shown])


def write_result(name: str, script: str, results: dict[str, Any], *, data: Sequence[Path] = ()) -> Path:
    """Write bench/results/NAME.json: what ran where and when, then the results.

    Args:
        name: file name without its suffix.
        script: the `__file__` of the script that measured.
        results: JSON values, without absolute paths.
        data: files and folders on the command line.
    """
    script = Path(script).resolve().relative_to(PROJECT).as_posix()
    value = {
        "script": script,
        "command": shown_command(script, data, sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        **results,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(PROJECT)}")
    return path


Output = TypeVar("Output")


class QuietTimer:
    """Times calls, and times them again when other processes took part of the machine meanwhile.

    What is thrown away is decided by the CPU time of the others, never by how long the call took.
    """

    def __init__(self, patience: float, most_share: float = 0.1) -> None:
        """Wait at most `patience` seconds in all for calls in which others take up to `most_share` of all cores."""
        self._gives_up = time.monotonic() + patience
        self._most_share = most_share
        self.kept_shares: list[float] = []
        self.discarded = 0

    def time(self, call: Callable[[], Output]) -> tuple[float, Output]:
        """Seconds of one undisturbed call, and what it returned; exits when the machine stays busy."""
        while True:
            busy_before, own_before = _cpu_seconds()
            began = time.perf_counter()
            output = call()
            seconds = time.perf_counter() - began
            busy_after, own_after = _cpu_seconds()
            others = (busy_after - busy_before) - (own_after - own_before)
            share = max(0.0, others / (seconds * (os.cpu_count() or 1)))
            if share <= self._most_share:
                self.kept_shares.append(share)
                return seconds, output
            self.discarded += 1
            if time.monotonic() > self._gives_up:
                raise SystemExit("other processes keep the machine busy: stop them, or raise --patience")

    def described(self) -> dict[str, Any]:
        """What to report beside the timings."""
        kept = {"others_cpu_share": round(statistics.mean(self.kept_shares), 3)} if self.kept_shares else {}
        return {**kept, "most_others_cpu_share": self._most_share, "discarded_calls": self.discarded}


def _cpu_seconds() -> tuple[float, float]:
    """CPU time that the machine, and that this process with its finished children, has spent."""
    own = sum(os.times()[:4])
    if not Path("/proc/stat").exists():
        return own, own
    ticks = [int(value) for value in Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own


def peak_memory_mb() -> float | None:
    """The most resident memory this process has had, in MB of 10^6 bytes; None where the system does not tell."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    peak = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e6

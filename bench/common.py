"""What the scripts here share: they describe the machine and write bench/results/NAME.json, all in one form."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "bench" / "results"
_PACKAGES = ("redwhale", "torch", "sentencepiece", "numpy", "pyarrow", "tokenizers", "transformers")


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

    Paths in the project are shown relative to it.
    """
    outside = [str(path.resolve()) for path in paths if not path.resolve().is_relative_to(PROJECT)]
    data = os.path.commonpath(outside) if outside else None
    if data is not None and Path(data).is_file():
        data = os.path.dirname(data)
    shown = []
    for argument in arguments:
        name, separator, value = argument.rpartition("=")
        resolved = str(Path(value).resolve())
        if Path(resolved).exists() and data is not None and Path(resolved).is_relative_to(data):
            value = str(Path("DATA") / Path(resolved).relative_to(data))
        elif Path(value).exists() and Path(resolved).is_relative_to(PROJECT):
            value = str(Path(resolved).relative_to(PROJECT))
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


def peak_memory_mb() -> float | None:
    """The most resident memory this process has had, in MB of 10^6 bytes; None where the system does not tell."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    peak = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e6

"""Progress on a terminal as a bar, in a log as plain lines."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Least time between two lines in a log."""


class Progress:
    """Counts work done, showing throughput and the time left; a context manager.

    Args:
        label: what is being done.
        total: units in all, or None where that is not known.
        unit: name of a unit; "B" is shown in kB, MB, GB.
        done: units that an earlier run already did.
        shown: whether to show anything.
    """

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0, *, shown: bool = True) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._done, self._skipped = done, done
        self._began = self._last_line = time.monotonic()
        self._fields: dict[str, Any] = {}
        self._bar = None
        self._shown = shown
        if shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=label, unit=unit, unit_scale=True, dynamic_ncols=True, leave=False
            )

    def update(self, amount: int, **fields: Any) -> None:
        """Add finished units, and values to show beside them."""
        self._done += amount
        self._fields.update(fields)
        if self._bar is not None:
            if fields:
                self._bar.set_postfix(fields, refresh=False)
            self._bar.update(amount)
        elif self._shown and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        rate = (self._done - self._skipped) / max(1e-9, time.monotonic() - self._began)
        parts = [f"{self.label}: {scaled(self._done)}{self.unit}", f"{scaled(rate)}{self.unit}/s"]
        if self.total:
            parts[0] += f" of {scaled(self.total)}{self.unit} ({100 * self._done / self.total:.0f}%)"
            parts.append(f"{max(0, self.total - self._done) / max(1e-9, rate):.0f} s left")
        parts += [f"{name} {value}" for name, value in self._fields.items()]
        return ", ".join(parts)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


def scaled(number: float) -> str:
    """A number with a metric prefix, such as 12.3k; nothing is added below 1,000."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or prefix == "T":
            return f"{number:.3g}{prefix}" if prefix else f"{number:.0f}"
        number /= 1000
    raise AssertionError

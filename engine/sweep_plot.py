"""The curve of a vocabulary sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..tokenizer.sweep import SweepRow


def plot_sweep(rows: Sequence[SweepRow], knee: int, path: Path) -> None:
    """Draw token ratio over added pieces, by domain and their mean, with a line at the knee."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    added = [row.added for row in rows]
    for domain in rows[0].ratios:
        axes.plot(added, [row.ratios[domain] for row in rows], linewidth=1, alpha=0.6, label=domain)
    axes.plot(added, [row.mean_ratio for row in rows], color="black", marker="o", linewidth=2, label="mean")
    axes.axvline(knee, color="#66788a", linestyle="--", linewidth=1)
    axes.set_xlabel("added pieces")
    axes.set_ylabel("token ratio")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)

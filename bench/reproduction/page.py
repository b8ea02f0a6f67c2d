"""Puts the tables into docs/reproduction.md and draws its plots, from the files in bench/results.

python bench/reproduction/page.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reproduction.tables import BUDGETS, TABLES, read

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "reproduction.md"
_BLOCK = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The page with every table between its marks made anew."""
    return _BLOCK.sub(lambda found: found[1] + "\n".join(TABLES[found["name"]]()) + "\n" + found[3], text)


def draw() -> None:
    """Draw all plots beside the page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        with matplotlib.rc_context({"svg.hashsalt": "redwhale"}):
            figure.savefig(DOCS / f"reproduction-{name}.svg", metadata={"Date": None})
        plt.close(figure)

    figure, axes = plt.subplots(figsize=(8, 4))
    schedules = {budget: read(f"reproduction/schedules-{budget}")["conditions"] for budget in BUDGETS}
    names = list(schedules["tokens"])
    for number, (budget, conditions) in enumerate(schedules.items()):
        there = [name for name in names if name in conditions]
        points = [conditions[name]["after korean bits_per_byte"] for name in there]
        places = [names.index(name) + (number - 0.5) * 0.2 for name in there]
        _errorbar(axes, places, points, label=f"equal {'FLOPs' if budget == 'flops' else budget}", linestyle="")
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="bits per byte, Korean held out")
    axes.legend(frameon=False)
    save(figure, "schedules")

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, one in read("reproduction/initialisation")["conditions"].items():
        runs = one["runs"]
        steps = [0, *(point[0] for point in runs[0]["curve"]), runs[0]["stages"][0]["steps"]]
        middle = [
            sum(run["curve"][place][1]["korean"]["bits_per_byte"] for run in runs) / len(runs)
            for place in range(len(runs[0]["curve"]))
        ]
        ends = [one[f"{when} korean bits_per_byte"]["mean"] for when in ("before", "after")]
        axes.plot(steps, [ends[0], *middle, ends[1]], marker="o", markersize=3, label=name)
    axes.set(xlabel="steps of the stage embed+head", ylabel="bits per byte, Korean held out")
    axes.legend(frameon=False, fontsize="small")
    save(figure, "initialisation")

    figure, axes = plt.subplots(figsize=(7, 4))
    conditions = read("reproduction/replay")["conditions"]
    for domain in ("korean", "wikipedia", "stories"):
        points = [one[f"after {domain} bits_per_byte"] for one in conditions.values()]
        _errorbar(axes, [float(share.rstrip("%")) for share in conditions], points, label=domain, marker="o")
    axes.set(xlabel="% of English among the tokens", ylabel="bits per byte")
    axes.legend(frameon=False)
    save(figure, "replay")

    figure, axes = plt.subplots(figsize=(7, 4))
    result = read("reproduction/vocabulary")
    added = [size["added"] for size in result["sizes"].values()]
    points = [result["conditions"][name]["after korean bits_per_byte"] for name in result["sizes"]]
    _errorbar(axes, added, points, marker="o")
    axes.set(xlabel="added pieces", ylabel="bits per byte at equal compute, Korean held out")
    save(figure, "vocabulary")


def _errorbar(axes: Any, places: list[float], points: list[Mapping[str, Any]], **style: Any) -> None:
    axes.errorbar(
        places,
        [point["mean"] for point in points],
        yerr=[point["interval"] or 0 for point in points],
        capsize=3,
        **{"marker": "o", "markersize": 4, **style},
    )


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw()

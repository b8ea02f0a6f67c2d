"""One self-contained HTML page about a run: what the filter dropped, token ratio, losses, evaluation."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .errors import RunError
from .evaluation_tables import evaluation_tables
from .run_folder import MANIFEST, STAGES, read_manifest

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dde5 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e4eaf0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto } .muted { color: #66788a } q { color: #66788a }
"""
_ORDER = ("base", "filter", "tokenizer", "init", "pack", "train", "sft", "eval", "export")
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8a5a9e", "#b8860b", "#4a5a6a")


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the manifests and metrics of the run, and return its path.

    The page needs no other file and no network.

    Raises:
        RunError: if the folder holds no finished step.
    """
    run_dir = Path(run_dir)
    manifests = _read_manifests(run_dir)
    if not manifests:
        raise RunError(f"{run_dir} holds no finished step, so there is nothing to report")
    by_step = {manifest["step"]: manifest for manifest in manifests}
    sections = [_overview(manifests)]
    builders = {"filter": _filter, "tokenizer": _tokenizer, "init": _init}
    sections += [build(by_step[name]["summary"]) for name, build in builders.items() if name in by_step]
    sections += [_training(run_dir, [m for m in manifests if m["step"].startswith(("train/", "sft"))])]
    sections += [_evaluation(by_step["eval"]["summary"])] if "eval" in by_step else []
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>RedWhale: {escape(run_dir.name)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(run_dir.name)}</h1><p class=muted>{_versions(manifests)}</p>{''.join(sections)}</body></html>\n"
    )
    path = run_dir / "report.html"
    staging = path.with_name("report.html.writing")
    staging.write_text(page, encoding="utf-8")
    staging.rename(path)
    return path


def _read_manifests(run_dir: Path) -> list[dict[str, Any]]:
    paths = [*run_dir.glob(f"*/{MANIFEST}"), *run_dir.glob(f"train/*/{MANIFEST}")]
    folders = [path.parent for path in paths if not path.parent.name.endswith((".partial", ".previous"))]
    if (run_dir / STAGES).exists():
        stages = json.loads((run_dir / STAGES).read_text(encoding="utf-8"))
        folders = [folder for folder in folders if folder.parent == run_dir or f"train/{folder.name}" in stages]
    manifests = [manifest for folder in folders if (manifest := read_manifest(folder)) is not None]

    def place(manifest: dict[str, Any]) -> tuple[int, int]:
        step, _, stage = manifest["step"].partition("/")
        return _ORDER.index(step), int(stage.partition("-")[0] or 0)  # a stage's folder begins with its number

    return sorted(manifests, key=place)


def _versions(manifests: Sequence[dict[str, Any]]) -> str:
    versions = manifests[-1]["versions"]
    return escape(", ".join(f"{package} {version}" for package, version in versions.items()))


def _overview(manifests: Sequence[dict[str, Any]]) -> str:
    rows = [
        (m["step"], m["went_in"], m["came_out"], _number(m["before"], 4), _number(m["after"], 4), f"{m['seconds']:.1f}")
        for m in manifests
    ]
    head = ("step", "in", "out", "loss before", "loss after", "seconds")
    return "<h2>Steps</h2>" + _table(head, rows, numeric=(3, 4, 5))


def _filter(summary: dict[str, Any]) -> str:
    rules = summary["rules"]
    rows = [
        (
            rule["name"],
            rule["description"],
            f"{rule['dropped_documents']:,}",
            f"{rule['dropped_bytes'] / 1e3:,.0f}",
            f"{rule['failing_documents']:,}",
            f"{rule['unique_documents']:,}",
        )
        for rule in rules
    ]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(rules) + 1))
    names = [rule["name"] for rule in rules][::-1]
    axes.barh(names, [rule["dropped_bytes"] / 1e3 for rule in rules][::-1], color=_COLOURS[0])
    axes.set_xlabel("kB of text dropped")
    examples = [
        (rule["name"], example["id"], f"{example['score']:.3g}", example["snippet"])
        for rule in rules
        for example in rule["examples"]
    ]
    kept = summary["bytes_out"] / max(1, summary["bytes_in"])
    sources = [
        (name, *(f"{source[key]:,}" for key in ("documents_in", "documents_out", "bytes_in", "bytes_out")))
        for name, source in summary["sources"].items()
    ]
    return (
        "<h2>Filter</h2>"
        f"<p>{summary['documents_in']:,} documents in, {summary['documents_out']:,} out; {kept:.1%} of the bytes kept; "
        f"{summary['broken_records']:,} broken records set aside.</p>"
        + _svg(figure)
        + _table(
            ("rule", "what it measures", "dropped first by it", "kB dropped", "failing it", "failing only it"),
            rows,
            numeric=(2, 3, 4, 5),
        )
        + _table(("source", "documents in", "out", "bytes in", "out"), sources, numeric=(1, 2, 3, 4))
        + "<h3>Examples of what was dropped</h3>"
        + _table(("rule", "document", "score", "beginning"), examples, numeric=(2,))
    )


def _tokenizer(summary: dict[str, Any]) -> str:
    rows = [
        (
            domain["domain"],
            f"{domain['base_tokens']:,}",
            f"{domain['hybrid_tokens']:,}",
            f"{domain['ratio']:.3f}",
            f"{domain['base_chars_per_token']:.2f}",
            f"{domain['hybrid_chars_per_token']:.2f}",
        )
        for domain in summary["domains"]
    ]
    figure, axes = plt.subplots(figsize=(6, 0.4 * len(rows) + 1))
    axes.barh([d["domain"] for d in summary["domains"]], [d["ratio"] for d in summary["domains"]], color=_COLOURS[0])
    axes.axvline(1.0, color="#66788a", linewidth=1, linestyle="--")
    axes.set_xlabel("tokens of the hybrid over tokens of the base")
    return (
        "<h2>Tokenizer</h2>"
        f"<p>{summary['base_pieces']:,} base pieces and {summary['added']:,} added ones; base "
        f"{escape(summary['base'])}; {len(summary['english_changes']):,} of {summary['english_lines']:,} "
        "English lines encode differently.</p>"
        + _svg(figure)
        + _table(
            ("domain", "base tokens", "hybrid tokens", "token ratio", "base chars/token", "hybrid chars/token"),
            rows,
            numeric=(1, 2, 3, 4, 5),
        )
    )


def _init(summary: dict[str, Any]) -> str:
    everything = {"base model, base tokenizer": summary["base"], **summary["methods"]}
    rows = [
        (
            label,
            domain,
            _number(r["bits_per_byte"], 3),
            _number(r["loss"], 3),
            f"{r['accuracy']:.4f}",
            # Runs of earlier versions measured no ranks.
            f"{r['median_rank']:,.0f}" if "median_rank" in r else "",
            _number(r.get("mean_reciprocal_rank"), 4),
            f"{r['new_mass']:.2%}" if "new_mass" in r else "",
        )
        for label, domains in everything.items()
        for domain, r in domains.items()
    ]
    details = [
        (label, tensor, f"{r['collisions']:,}", f"{r['collisions_left']:,}", _number(r["median_norm"], 4))
        for label, tensors in summary.get("rows", {}).items()
        for tensor, r in tensors.items()
    ]
    domains = list(summary["base"])
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(everything) * max(1, len(domains)) + 1))
    height = 0.8 / max(1, len(domains))
    for place, domain in enumerate(domains):
        values = [measured[domain]["bits_per_byte"] for measured in everything.values()]
        places = [-index - place * height for index in range(len(values))]
        axes.barh(places, values, height=height, color=_COLOURS[place % len(_COLOURS)], label=domain)
    axes.set_yticks([-index for index in range(len(everything))], list(everything))
    axes.set_xlabel("bits per byte")
    axes.legend(frameon=False, fontsize=8)
    tied = " The head is the embedding." if summary.get("tied") else ""
    bytes_alone = f", {summary['byte_only']:,} of them spelled in bytes alone" if "byte_only" in summary else ""
    return (
        "<h2>New vocabulary before any training</h2>"
        f"<p>{summary['new_rows']:,} new rows{bytes_alone}; methods are embedding/head; "
        f"chosen: {escape(summary['chosen'])}.{tied}</p>"
        + _svg(figure)
        + _table(
            (
                *("method", "text", "bits per byte", "nats per token", "accuracy", "median rank"),
                *("mean reciprocal rank", "probability of new pieces"),
            ),
            rows,
            numeric=(2, 3, 4, 5, 6, 7),
        )
        + _table(
            ("method", "matrix", "coinciding rows", "left when stored", "median norm"),
            details,
            numeric=(2, 3, 4),
        )
    )


def _training(run_dir: Path, manifests: Sequence[dict[str, Any]]) -> str:
    if not manifests:
        return ""
    figure, axes = plt.subplots(figsize=(9, 4))
    offset = 0
    for number, manifest in enumerate(manifests):
        lines = [json.loads(line) for line in (run_dir / manifest["step"] / "metrics.jsonl").read_text().splitlines()]
        colour = _COLOURS[number % len(_COLOURS)]
        losses = [(offset + line["tokens"], line["loss"]) for line in lines if "loss" in line]
        # The first of the validation sets is what the run's table shows.
        checks = [
            (offset + line["tokens"], next(iter(line["validation"].values()))["loss"])
            for line in lines
            if line.get("validation")
        ]
        axes.plot(*zip(*losses, strict=True), color=colour, linewidth=1, alpha=0.7, label=manifest["step"])
        if checks:
            axes.plot(*zip(*checks, strict=True), color=colour, marker="o", linewidth=2)
        offset += lines[-1]["tokens"]
        axes.axvline(offset, color="#d5dde5", linewidth=1)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, ncols=3, fontsize=8)
    return (
        "<h2>Loss across the stages</h2>" + _svg(figure) + "<p class=muted>Thin: training. Dots: validation, before "
        "and after each stage. Fine-tuning counts answer tokens only.</p>"
    )


def _evaluation(summary: dict[str, Any]) -> str:
    parts = ["<h2>Evaluation</h2>"]
    for table in evaluation_tables(summary):
        numeric = range(table.text_columns, len(table.header))
        parts += [f"<h3>{escape(table.title)}</h3>", _table(table.header, table.rows, numeric=numeric)]
        parts += [f"<p class=muted>{escape(table.note)}</p>"] if table.note else []
    return "".join(parts)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (
            f"<{tag} class=n>{escape(cell)}</{tag}>" if column in numeric else f"<{tag}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _svg(figure) -> str:
    """The figure as inline SVG; text stays text, so that the page's own fonts show it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "redwhale"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]

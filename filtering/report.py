"""report.html: one self-contained page that shows what the filter dropped and why."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from .rules import Threshold
from .summary import Example, FilterSummary, Histogram, RuleSummary

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dde5 } h3 { margin: 1.6rem 0 .2rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4eaf0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td.q { color: #445566 }
svg { max-width: 100%; height: auto; display: block } svg text { font: 12px system-ui, sans-serif; fill: #445566 }
.muted { color: #66788a } details summary { cursor: pointer; color: #1b6ca8 }
"""
_KEPT, _DROPPED, _LINE = "#1b6ca8", "#c8553d", "#66788a"


def write_report(summary: FilterSummary) -> str:
    """Returns the page: waterfall, removals by rule and their overlaps, histograms with examples, sources."""
    kept = summary.bytes_out / max(summary.bytes_in, 1)
    parts = [
        f"<p>{summary.documents_in:,} documents of {_mb(summary.bytes_in)} in, {summary.documents_out:,} of "
        f"{_mb(summary.bytes_out)} out: {kept:.1%} of the bytes, about {summary.estimated_tokens:,} tokens of a hybrid "
        f"Korean tokenizer. {summary.broken_records:,} records held no readable document, "
        f"{summary.repaired_encodings:,} were read in a wrong encoding and repaired, {summary.lines_removed:,} "
        f"boilerplate lines were taken out of kept documents, {sum(summary.masked.values()):,} pieces of personal data "
        "were masked.</p>",
        "<h2>From raw to kept</h2>",
        _waterfall(summary),
        "<h2>What each rule removes</h2>"
        "<p class=muted>A document counts as dropped by the first rule that it fails, in this order; it fails a rule "
        "whatever else it fails; it is unique to a rule when it fails no other.</p>",
        _removals(summary.rules),
        "<h3>Overlaps</h3><p class=muted>Documents that fail both rules; on the diagonal those that fail the rule.</p>",
        _overlaps(summary),
        "<h2>Sources</h2>",
        _table(
            ("source", "documents in", "out", "kept", "MB in", "MB out"),
            (
                (
                    name,
                    f"{source.documents_in:,}",
                    f"{source.documents_out:,}",
                    f"{source.documents_out / max(source.documents_in, 1):.1%}",
                    _mb(source.bytes_in),
                    _mb(source.bytes_out),
                )
                for name, source in summary.sources.items()
            ),
            numeric=(1, 2, 3, 4, 5),
        ),
        _masked(summary),
        "<h2>Scores</h2><p class=muted>All documents by score, the shaded side is dropped; the height is the logarithm "
        "of the count. Examples are random ones.</p>",
        *(_rule(rule) for rule in summary.rules),
        _matches(summary),
        _broken(summary),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Filter report</title>'
        f"<style>{_STYLE}</style></head><body><h1>Filter report</h1>{''.join(parts)}</body></html>\n"
    )


def _waterfall(summary: FilterSummary) -> str:
    """Bars of what is left after each rule, the part that it takes coloured."""
    steps = [(rule.name, rule.dropped_documents, rule.dropped_bytes) for rule in summary.rules if rule.dropped_bytes]
    steps += [("boilerplate lines", 0, summary.bytes_of_lines), ("normalisation", 0, summary.bytes_normalized)]
    scale = 420 / max(summary.bytes_in, 1)
    left, documents = summary.bytes_in, summary.documents_in
    rows = [_bar(0, "read", left * scale, 0, f"{_mb(left)}, {documents:,} documents")]
    for number, (name, fewer, size) in enumerate(steps, start=1):
        left -= size
        documents -= fewer
        label = f"−{_mb(size)}" + (f", −{fewer:,} documents" if fewer else "")
        rows.append(_bar(number, name, left * scale, max(size, 0) * scale, label))
    rows.append(_bar(len(rows), "kept", left * scale, 0, f"{_mb(left)}, {documents:,} documents"))
    return f'<svg viewBox="0 0 900 {24 * len(rows)}" role="img">{"".join(rows)}</svg>'


def _bar(row: int, name: str, kept: float, taken: float, label: str) -> str:
    y = 24 * row
    return (
        f'<text x="170" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
        f'<rect x="180" y="{y + 3}" width="{kept:.1f}" height="16" fill="{_KEPT}"/>'
        f'<rect x="{180 + kept:.1f}" y="{y + 3}" width="{taken:.1f}" height="16" fill="{_DROPPED}"/>'
        f'<text x="{188 + kept + taken:.1f}" y="{y + 15}">{escape(label)}</text>'
    )


def _removals(rules: Iterable[RuleSummary]) -> str:
    rows = (
        (
            rule.name,
            rule.group,
            _range(rule.threshold),
            f"{rule.dropped_documents:,}",
            _mb(rule.dropped_bytes),
            f"{rule.failing_documents:,}",
            _mb(rule.failing_bytes),
            f"{rule.unique_documents:,}",
            _mb(rule.unique_bytes),
            rule.description,
        )
        for rule in rules
    )
    head = ("rule", "group", "passes", "dropped", "MB", "failing", "MB", "unique", "MB", "what it measures")
    return _table(head, rows, numeric=(3, 4, 5, 6, 7, 8))


def _overlaps(summary: FilterSummary) -> str:
    places = [place for place, rule in enumerate(summary.rules) if rule.failing_documents]
    names = [summary.rules[place].name for place in places]
    rows = (
        (name, *(f"{summary.overlaps[place][other]:,}" if other <= place else "" for other in places))
        for name, place in zip(names, places, strict=True)
    )
    return _table(("", *names), rows, numeric=range(1, len(names) + 1))


def _rule(rule: RuleSummary) -> str:
    dropped = (("dropped", example) for example in rule.examples)
    kept = (("kept", example) for example in rule.kept_examples)
    examples = [*dropped, *kept]
    shown = _histogram(rule.histogram, rule.threshold) if rule.histogram is not None else ""
    if not shown and not examples:
        return ""
    off = ", off: it drops nothing" if rule.threshold.enabled is False else ""
    return (
        f"<h3>{escape(rule.name)}</h3><p class=muted>{escape(rule.description)}; passes: "
        f"{escape(_range(rule.threshold))}{off}</p>{shown}"
        f"<details><summary>{len(rule.examples)} dropped, {len(rule.kept_examples)} kept</summary>"
        + _table(("", "document", "score", "beginning"), map(_example, examples), numeric=(2,))
        + "</details>"
    )


def _example(labelled: tuple[str, Example]) -> tuple[str, str, str, str]:
    label, example = labelled
    return label, example.id, f"{example.score:.4g}", example.snippet


def _histogram(histogram: Histogram, threshold: Threshold) -> str:
    width, height = 16, 80
    top = max(map(math.log1p, histogram.counts), default=0) or 1
    bars = []
    for place, count in enumerate(histogram.counts):
        tall = height * math.log1p(count) / top
        low = histogram.low + place * histogram.width
        bars.append(
            f'<rect x="{place * width}" y="{height - tall:.1f}" width="{width - 2}" height="{tall:.1f}" '
            f'fill="{_KEPT}"><title>from {low:.4g}: {count:,} documents</title></rect>'
        )
    end = len(histogram.counts) * width
    shade = []
    for bound, beyond in ((threshold.minimum, False), (threshold.maximum, True)):
        if bound is None or not math.isfinite(bound) or threshold.enabled is False:
            continue
        x = min(max((bound - histogram.low) / histogram.width * width, 0), end)
        start, size = (x, end - x) if beyond else (0, x)
        shade.append(
            f'<rect x="{start:.1f}" y="0" width="{size:.1f}" height="{height}" fill="{_DROPPED}" opacity="0.15"/>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="{_DROPPED}"/>'
        )
    last = histogram.low + len(histogram.counts) * histogram.width
    axis = (
        f'<text x="0" y="{height + 14}">{histogram.low:.4g}</text>'
        f'<text x="{end}" y="{height + 14}" text-anchor="end">{last:.4g} and more</text>'
    )
    return f'<svg viewBox="0 0 {end} {height + 18}" style="width:{end}px">{"".join([*shade, *bars])}{axis}</svg>'


def _masked(summary: FilterSummary) -> str:
    if not summary.masked:
        return ""
    rows = ((kind, f"{count:,}") for kind, count in sorted(summary.masked.items()))
    return "<h2>Personal data masked</h2>" + _table(("kind", "placeholders"), rows, numeric=(1,))


def _matches(summary: FilterSummary) -> str:
    if not summary.matches:
        return ""
    rows = ((one.document, one.benchmark, f"{one.record:,}", f"{one.share:.0%}", one.text) for one in summary.matches)
    head = ("document", "benchmark", "record", "found", "text")
    return "<h2>Benchmarks in the corpus</h2>" + _table(head, rows, numeric=(2, 3))


def _broken(summary: FilterSummary) -> str:
    if not summary.broken_examples:
        return ""
    return "<h2>Broken records</h2>" + _table(("the first of them",), ((one,) for one in summary.broken_examples))


def _range(threshold: Threshold) -> str:
    sides = (("≥", threshold.minimum), ("≤", threshold.maximum))
    return " and ".join(f"{sign} {bound:g}" for sign, bound in sides if bound is not None and math.isfinite(bound))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    right = set(numeric)

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (
            f"<{tag}{' class=n' if column in right else ''}>{escape(cell)}</{tag}>" for column, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"

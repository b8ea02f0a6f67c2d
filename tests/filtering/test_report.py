from html.parser import HTMLParser

import msgspec
import numpy as np
from filtering_corpus import mixed_corpus

from redwhale.filtering import RULES, FilterConfig, FilterSummary, filter_corpus, measure_documents, read_documents
from redwhale.filtering.report import write_report
from redwhale.filtering.summary import BYTES_PER_TOKEN


class Page(HTMLParser):
    """Text of the cells of every table row, and tags left open."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def summary_of(tmp_path, **settings) -> FilterSummary:
    mixed_corpus(tmp_path / "in")
    return filter_corpus(FilterConfig(inputs=[str(tmp_path / "in")], **settings), tmp_path / "out")


def test_the_page_shows_the_counts_of_every_rule_and_is_whole(tmp_path):
    summary = summary_of(tmp_path)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert text == write_report(summary)
    page = Page(text)
    assert page.open == []
    assert not any(outside in text for outside in ("http:", "https:", "<script", "<link", "<img", "src="))
    rows = {row[0]: row for row in page.rows if len(row) == 10}
    for rule in summary.rules:
        assert rows[rule.name][3] == f"{rule.dropped_documents:,}"
        assert rows[rule.name][5] == f"{rule.failing_documents:,}"
        assert rows[rule.name][7] == f"{rule.unique_documents:,}"
    for name, source in summary.sources.items():
        assert [name, f"{source.documents_in:,}", f"{source.documents_out:,}"] in [row[:3] for row in page.rows]
    assert f"about {summary.estimated_tokens:,} tokens" in text
    assert summary.estimated_tokens == round(summary.bytes_out / BYTES_PER_TOKEN)


def test_markup_in_a_document_does_not_reach_the_page(tmp_path):
    mixed_corpus(tmp_path / "in")
    (tmp_path / "in" / "d.jsonl").write_text(
        msgspec.json.encode({"id": "<b>", "text": "<script>alert(1)</script> " * 9, "source": "<i>&"}).decode()
    )
    filter_corpus(FilterConfig(inputs=[str(tmp_path / "in")], examples_per_rule=500), tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in text
    assert "<script" not in text
    assert "&lt;i&gt;&amp;" in text


def test_histograms_and_overlaps_equal_those_of_all_documents(tmp_path):
    summary = summary_of(tmp_path)
    config = FilterConfig(inputs=[str(tmp_path / "in")])
    documents = [one for path in sorted((tmp_path / "in").iterdir()) for one in read_documents(path)]
    measured = measure_documents(documents, config.measure_options())
    for place, name in enumerate(RULES):
        rule = summary.rules[place]
        counts = [0] * len(rule.histogram.counts)
        for one in measured:
            bin_ = int((float(np.float32(one.scores[name])) - rule.histogram.low) / rule.histogram.width)
            counts[max(0, min(bin_, len(counts) - 1))] += 1
        assert sum(rule.histogram.counts) == len(measured)
        assert counts == rule.histogram.counts
        for other, beside in enumerate(RULES):
            both = sum(name in one.failed and beside in one.failed for one in measured)
            assert summary.overlaps[place][other] == both
        assert summary.overlaps[place][place] == rule.failing_documents


def test_examples_are_of_dropped_and_of_kept_documents(tmp_path):
    summary = summary_of(tmp_path, examples_per_rule=4)
    for rule in summary.rules[: len(RULES)]:
        assert len(rule.kept_examples) == 4
        assert len(rule.examples) == min(4, rule.dropped_documents) or rule.dropped_documents > 0
        for example in rule.kept_examples:
            low, high = rule.threshold.minimum, rule.threshold.maximum
            assert low is None or example.score >= low
            assert high is None or example.score <= high
    assert len({example.id for rule in summary.rules for example in rule.kept_examples}) > 20
    assert summary_of(tmp_path / "none", examples_per_rule=0).rules[0].kept_examples == []

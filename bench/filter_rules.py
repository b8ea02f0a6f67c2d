"""How every rule scores real text, source by source, how fast that is, and how the labelled set of the tests fares.

Thresholds are read off the inputs: what the scores of good sources are, and what share of each source a rule drops,
alone and in all. Text given with --unseen has served for no threshold. The speed is that of one process normalising,
masking personal data and scoring by all rules, in CPU time, beside the time of each part.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import PROJECT, parser, write_result

from redwhale.filtering import (
    RULES,
    Document,
    Measured,
    MeasureOptions,
    content_id,
    find_inputs,
    measure_documents,
    normalize_text,
    prepare_batch,
    read_documents,
)
from redwhale.filtering.personal_data import mask_personal_data


def sample(path: Path, megabytes: float, html: bool) -> list[Document]:
    """Documents of a file, chosen by content, of about so many megabytes."""
    documents = sorted(read_documents(path, html=html), key=lambda document: content_id(normalize_text(document.text)))
    chosen, size = [], 0.0
    for document in documents:
        if size >= megabytes * 1e6:
            break
        chosen.append(document)
        size += len(document.text.encode("utf-8", "surrogatepass"))
    return chosen


def described(measured: list[Measured]) -> dict[str, Any]:
    """Percentiles 1, 50 and 99 of every rule's scores, and the share of documents that it drops, alone and at all."""
    rules = {}
    for name in RULES:
        scores = np.array([one.scores[name] for one in measured])
        rules[name] = {
            "p1": round(float(np.percentile(scores, 1)), 4),
            "p50": round(float(np.percentile(scores, 50)), 4),
            "p99": round(float(np.percentile(scores, 99)), 4),
            "dropped": round(float(np.mean([name in one.failed for one in measured])), 4),
            "dropped_alone": round(float(np.mean([one.failed == (name,) for one in measured])), 4),
        }
    masked: dict[str, int] = defaultdict(int)
    for one in measured:
        for kind, count in one.masked.items():
            masked[kind] += count
    return {
        "documents": len(measured),
        "dropped": round(float(np.mean([bool(one.failed) for one in measured])), 4),
        "masked": dict(masked),
        "rules": rules,
    }


def labelled() -> dict[str, Any]:
    """Recall and precision on fresh draws of the tests' labelled set, whose seeds the tests do not use."""
    sys.path.insert(0, str(PROJECT / "tests"))
    from labelled_korean import BAD, bad_documents, good_documents

    good, bad = good_documents(2000, seed=1001), bad_documents(80, seed=1002)
    options = MeasureOptions()
    results = measure_documents([Document("", one.text, one.kind) for one in [*good, *bad]], options)
    of_good, of_bad = results[: len(good)], results[len(good) :]
    kinds = {kind: round(float(np.mean([bool(one.failed) for one in of_bad if one.source == kind])), 4) for kind in BAD}
    rules = {}
    for name in RULES:
        right = sum(name in one.failed for one in of_bad)
        wrong = sum(name in one.failed for one in of_good)
        meant = [one for one in of_bad if name in BAD[one.source][1]]
        rules[name] = {
            "recall": round(float(np.mean([name in one.failed for one in meant])), 4) if meant else None,
            "precision": round(right / (right + wrong), 4) if right + wrong else None,
        }
    return {
        "good": len(good),
        "bad": len(bad),
        "good_dropped": round(float(np.mean([bool(one.failed) for one in of_good])), 4),
        "bad_dropped": round(float(np.mean([bool(one.failed) for one in of_bad])), 4),
        "bad_dropped_by_kind": kinds,
        "rules": rules,
    }


def speed(documents: list[Document]) -> dict[str, Any]:
    """MB a second of CPU time of one process, and ms per MB of its parts; the best of three calls each."""
    options = MeasureOptions()
    megabytes = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in documents) / 1e6
    texts = [normalize_text(document.text) for document in documents]
    prepared = [one for start in range(0, len(texts), 20) for one in prepare_batch(texts[start : start + 20])]

    def seconds(call: Callable[[], Any]) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began

    def best(call: Callable[[], Any]) -> float:
        return min(seconds(call) for _ in range(3)) / megabytes * 1e3

    whole = best(lambda: measure_documents(documents, options))
    parts = {
        "normalise": best(lambda: [normalize_text(document.text) for document in documents]),
        "mask": best(lambda: [mask_personal_data(text) for text in texts]),
        "count": best(lambda: [prepare_batch(texts[start : start + 20]) for start in range(0, len(texts), 20)]),
        "score": best(lambda: [rule.score(one) for one in prepared for rule in RULES.values()]),
    }
    return {
        "text_mb": round(megabytes, 2),
        "mb_per_cpu_second": round(1e3 / whole, 2),
        "ms_per_mb": round(whole, 2),
        "parts_ms_per_mb": {name: round(value, 2) for name, value in parts.items()},
    }


def main() -> None:
    """Measure, print the shares, and write the result."""
    arguments = parser(__doc__, "filter_rules")
    arguments.add_argument("inputs", nargs="+", type=Path, help="files and folders of real Korean text")
    arguments.add_argument("--unseen", nargs="*", type=Path, default=[], help="text that no threshold was chosen on")
    arguments.add_argument("--html", nargs="*", type=Path, default=[], help="files whose texts are HTML, to extract")
    arguments.add_argument("--megabytes", type=float, default=3, help="of each file (default: %(default)s)")
    given = arguments.parse_args()

    began = time.perf_counter()
    sources: dict[str, dict[str, Any]] = {}
    everything: list[Document] = []
    for kind, inputs in (("", given.inputs), ("unseen ", given.unseen), ("main text of ", given.html)):
        for path in find_inputs([str(one) for one in inputs]) if inputs else []:
            documents = sample(path, given.megabytes, html=inputs is given.html)
            name = kind + path.name.split(".jsonl")[0]
            sources[name] = described(measure_documents(documents, MeasureOptions()))
            everything += documents if inputs is given.inputs else []
            print(f"{name:24s} {sources[name]['documents']:6d} documents, {sources[name]['dropped']:.1%} dropped")
    print(f"{time.perf_counter() - began:.0f} s")
    set_results = labelled()
    print(
        f"labelled: {set_results['bad_dropped']:.1%} of the bad dropped, {set_results['good_dropped']:.1%} of the good"
    )
    speeds = speed(everything)
    print(f"{speeds['mb_per_cpu_second']} MB/s, ms per MB: {speeds['parts_ms_per_mb']}")
    write_result(
        given.result,
        __file__,
        {"speed": speeds, "labelled": set_results, "sources": sources},
        data=[*given.inputs, *given.unseen, *given.html],
    )


if __name__ == "__main__":
    main()

"""The tables of docs/reproduction.md, from the results alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
PAPER_RATIOS = {"kobest/boolq": 0.52, "kobest/copa": 0.71, "kobest/hellaswag": 0.50, "kobest/sentineg": 0.69}
"""Token ratio of RedWhale to SOLAR (arXiv 2408.11294), whose tokenizer is of Mistral's kind."""
BUDGETS = ("tokens", "flops")


def read(name: str) -> dict[str, Any]:
    """A result by its name below bench/results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def spread(one: Mapping[str, Any], digits: int = 3) -> str:
    """Mean and half of the 95% interval."""
    noisy = one["interval"] is not None and max(one["values"]) != min(one["values"])
    interval = f" ± {one['interval']:.{digits}f}" if noisy else ""
    return f"{one['mean']:.{digits}f}{interval}"


def difference(result: Mapping[str, Any], name: str, digits: int = 3) -> tuple[str, str]:
    """Difference and verdict of a comparison; empty where there is none of that name."""
    for one in result["comparisons"]:
        if one["name"] == name:
            found = one["difference"]
            interval = "" if found["interval"] is None else f" ± {found['interval']:.{digits}f}"
            return f"{found['mean']:+.{digits}f}{interval}", one["verdict"]
    return "", ""


def token_ratio() -> list[str]:
    """Token ratio to Mistral by domain, and characters per token over all of it."""
    measured = read("reproduction/token_ratio")
    domains = list(measured["characters"])
    mistral = measured["tokenizers"]["Mistral"]["characters_per_token"]
    rows = {name: one["ratio_to_mistral"] for name, one in measured["tokenizers"].items()}
    for hybrid in read("hybrid_tokenizers")["hybrids"]:
        if hybrid["base"] in ("mistral", "llama2"):
            name = (
                f"{ {'mistral': 'Mistral', 'llama2': 'Llama-2'}[hybrid['base']] } + {hybrid['added']:,}, all the text"
            )
            per_token = {domain: one["hybrid_chars_per_token"] for domain, one in hybrid["domains"].items()}
            rows[name] = {domain: mistral[domain] / per_token[domain] for domain in domains}
    order = sorted(rows, key=lambda name: -sum(rows[name].values()))
    cells = [[name, *(f"{rows[name][domain]:.2f}" for domain in domains)] for name in order]
    paper = ["RedWhale in the paper", *(f"{PAPER_RATIOS[d]:.2f}" if d in PAPER_RATIOS else "" for d in domains)]
    return table(["tokenizer", *(domain.removeprefix("kobest/") for domain in domains)], [*cells, paper])


def initialisation_short() -> list[str]:
    """All choices of bench/init_methods.py, untied base: before and after twelve steps."""
    rows = []
    for choice in read("init_methods")["choices"]:
        if choice["base"] != "untied":
            continue

        def cell(key: str, digits: int, choice: Mapping[str, Any] = choice) -> str:
            mean, deviation = choice[key]
            return f"{mean:.{digits}f}" + ("" if not deviation else f" (sd {deviation:.{digits}f})")

        rows.append(
            [
                choice["choice"],
                cell("before_korean_loss", 2),
                cell("before_korean_accuracy", 4),
                cell("before_korean_bits_per_byte", 3),
                cell("after_korean_bits_per_byte", 3),
                cell("after_english_bits_per_byte", 3),
            ]
        )
    head = ["embedding/head", "loss", "accuracy", "bits per byte", "after 12 steps", "English after"]
    return table(head, rows)


def initialisation() -> list[str]:
    """The choices of our own runs at step 0, along training, and at its end."""
    result = read("reproduction/initialisation")
    rows = []
    for name, one in result["conditions"].items():
        curves = ([found["korean"]["bits_per_byte"] for _, found in run["curve"]] for run in one["runs"])
        middle = [f"{statistics.mean(bits):.3f}" for bits in zip(*curves, strict=True)]
        verdict = difference(result, f"initialisation after training: decomposition against {name}")
        rows.append(
            [
                name,
                spread(one["before korean loss"], 2),
                spread(one["before korean accuracy"], 4),
                spread(one["before korean bits_per_byte"]),
                *middle,
                spread(one["after korean bits_per_byte"]),
                verdict[0],
                verdict[1],
            ]
        )
    steps = [str(point[0]) for point in next(iter(result["conditions"].values()))["runs"][0]["curve"]]
    last = next(iter(result["conditions"].values()))["runs"][0]["stages"][0]["steps"]
    head = ["embedding/head", "loss", "accuracy", "bits per byte", *(f"step {step}" for step in steps)]
    return table([*head, f"step {last}", "decomposition less this", "verdict"], rows)


def stage_losses() -> list[str]:
    """Held-out Korean after every stage of the plans that have several, means over seeds."""
    result = read("reproduction/schedules-tokens")
    rows = []
    for name in ("redwhale", "sequential", "eeve", "badam"):
        one = result["conditions"][name]
        before = {metric: one[f"before korean {metric}"]["mean"] for metric in ("loss", "accuracy", "bits_per_byte")}
        rows.append([name, "", "before", *_measures(before)])
        for number, stage in enumerate(one["runs"][0]["stages"]):
            after = [run["stages"][number]["after"]["korean"] for run in one["runs"]]
            means = {metric: sum(found[metric] for found in after) / len(after) for metric in before}
            rows.append([name, f"{number + 1}", f"{stage['name']}", *_measures(means)])
    return table(["schedule", "", "stage", "loss", "accuracy", "bits per byte"], rows)


def _measures(found: Mapping[str, float]) -> list[str]:
    return [f"{found['loss']:.3f}", f"{found['accuracy']:.4f}", f"{found['bits_per_byte']:.3f}"]


def schedules(budget: str) -> list[str]:
    """Schedules at one budget, best first."""
    result = read(f"reproduction/schedules-{budget}")
    conditions, domains = result["conditions"], ("korean", "wikipedia", "stories")
    rows = []
    for name in sorted(conditions, key=lambda name: conditions[name]["after korean bits_per_byte"]["mean"]):
        one = conditions[name]
        found = difference(result, f"schedules at equal {budget}: redwhale against {name}")
        tokens = f"{sum(stage['tokens'] for stage in one['runs'][0]['stages']):,}"
        rows.append([name, tokens, *(spread(one[f"after {domain} bits_per_byte"]) for domain in domains), *found])
    before = conditions["redwhale"]
    rows.append(["before", "0", *(spread(before[f"before {domain} bits_per_byte"]) for domain in domains), "", ""])
    head = ["schedule", "tokens", "Korean", "Wikipedia", "stories", "Korean, redwhale less this", "redwhale is"]
    return table(head, rows)


def learning_rates() -> list[str]:
    """What the search tried, and chose."""
    result = read("reproduction/learning_rates")
    found = {"embedding and head": result["rows"], **result["schedules"]}
    rows = [
        [name, f"{one['scale']:.3g}", ", ".join(f"{s}: {b:.3f}" for s, b in one["tuning_bits_per_byte"].items())]
        for name, one in found.items()
    ]
    return table(["schedule", "factor", "bits per byte by factor"], rows)


def replay() -> list[str]:
    """Shares of English."""
    result = read("reproduction/replay")
    domains = ("korean", "wikipedia", "stories")
    rows = []
    for share, one in result["conditions"].items():
        cells = [share]
        for domain in domains:
            cells.append(spread(one[f"after {domain} bits_per_byte"]))
            cells.append(" ".join(difference(result, f"replay, {domain}: {share} against 0%")))
        rows.append([*cells, *(spread(one[f"after {domain} accuracy"]) for domain in domains)])
    before = next(iter(result["conditions"].values()))
    cells = [cell for domain in domains for cell in (spread(before[f"before {domain} bits_per_byte"]), "")]
    rows.insert(0, ["before", *cells, *(spread(before[f"before {domain} accuracy"]) for domain in domains)])
    less = "less 0%"
    head = ["English", "Korean", less, "Wikipedia", less, "stories", less]
    return table([*head, *(f"accuracy, {name}" for name in ("Korean", "Wikipedia", "stories"))], rows)


def vocabulary() -> list[str]:
    """Sizes at equal compute."""
    result = read("reproduction/vocabulary")
    usual = result["conditions"]
    reference = next(one["second"] for one in result["comparisons"])
    rows = []
    for name, size in result["sizes"].items():
        found = difference(result, f"vocabulary at equal compute: {name} against {reference}")
        rows.append(
            [
                f"{size['added']:,}",
                f"{size['flops_per_token'] / 1e6:.1f}",
                f"{size['tokens']:,}",
                f"{size['bytes_per_token']:.2f}",
                f"{size['tokens'] * size['bytes_per_token'] / 1e3:.0f}",
                spread(usual[name]["before korean bits_per_byte"]),
                spread(usual[name]["after korean bits_per_byte"]),
                spread(usual[name]["after korean loss"]),
                *found,
            ]
        )
    head = ["added", "MFLOPs a token", "tokens", "bytes a token", "kB of text", "before", "bits per byte"]
    return table([*head, "loss a token", f"less {int(reference):,}", "verdict"], rows)


def filtering() -> list[str]:
    """Filtered against raw text, and what is left of the variety."""
    result = read("reproduction/filtering")
    rows = []
    for name, one in result["conditions"].items():
        kept = result["diversity"][name]
        rows.append(
            [
                name,
                f"{kept['documents']:,}",
                f"{kept['megabytes']:.1f}",
                f"{kept['sources']}",
                f"{kept['distinct_ngrams']:.3f}",
                f"{kept['topic_coverage']:.3f}",
                spread(one["after korean bits_per_byte"]),
                *difference(result, f"filtering at equal tokens: filtered against {name}"),
            ]
        )
    head = ["corpus", "documents", "MB", "sources", "distinct 8-grams", "topics", "bits per byte"]
    return table([*head, "filtered less this", "verdict"], rows)


def memory() -> list[str]:
    """With which optimizer each schedule fits 80 GB at SOLAR's size, best first by equal tokens."""
    large = read("reproduction/cost")["schedules"]
    trained = read("reproduction/schedules-tokens")["conditions"]
    rows = []
    for name in sorted(trained, key=lambda name: trained[name]["after korean bits_per_byte"]["mean"]):
        one = large[name]
        settings = [stage.get("setting", "") for stage in one["stages"]]
        rows.append(
            [
                name,
                spread(trained[name]["after korean bits_per_byte"]),
                f"{one['adamw_bytes'] / 1e9:.0f}",
                " and ".join(dict.fromkeys(settings)),
                f"{one['bytes'] / 1e9:.0f}" if "bytes" in one else "",
            ]
        )
    return table(["schedule", "Korean at equal tokens", "GB with AdamW", "fits 80 GB with", "GB"], rows)


def cost() -> list[str]:
    """Memory and speed of every schedule, at SOLAR's size by the plan and at the proxy's by measurement."""
    large, small = read("reproduction/cost")["schedules"], read("reproduction/cost-proxy")["schedules"]
    rows = []
    for name, one in large.items():
        speed = one.get("tokens_per_second")
        rows.append(
            [
                name,
                f"{one['adamw_bytes'] / 1e9:.0f}",
                f"{one['flops_per_token'] / 1e9:.1f}",
                "" if speed is None else f"{speed:,.0f}",
                "" if speed is None else f"{9.7e9 / speed / 3600:,.0f}",
                f"{small[name]['bytes'] / 1e6:.0f}",
                f"{small[name]['tokens_per_cpu_second']:,.0f}",
            ]
        )
    head = ["schedule", "GB with AdamW", "GF a token", "tokens/s in 80 GB", "hours for 9.7 billion"]
    return table([*head, "proxy, MB", "proxy, tokens a CPU second"], rows)


TABLES: Mapping[str, Callable[[], list[str]]] = {
    "token_ratio": token_ratio,
    "initialisation_short": initialisation_short,
    "initialisation": initialisation,
    "learning_rates": learning_rates,
    "stage_losses": stage_losses,
    "schedules-tokens": lambda: schedules("tokens"),
    "schedules-flops": lambda: schedules("flops"),
    "schedules-memory": memory,
    "filtering": filtering,
    "replay": replay,
    "vocabulary": vocabulary,
    "cost": cost,
}
"""By the name between the page's marks."""

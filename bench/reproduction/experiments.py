"""The experiments that train: which conditions each compares, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from reproduction.conclusions import Comparison, compared, spread
from reproduction.cost import equal_flops
from reproduction.preparation import Prepared
from reproduction.schedules import ROWS, SCHEDULES
from reproduction.training import Condition, run_of

from redwhale.engine.flops import training_flops
from redwhale.engine.selectors import select_parameters
from redwhale.model import load_model
from redwhale.model.init_methods import PAPER_METHODS

INITS = (*PAPER_METHODS, "mean/mean+prior")
"""What stands for the paper's five, and ours."""
INIT_STEPS, INIT_CURVE = 16, (4, 8)
"""Of a training run, the same at every size: the order of the methods turns within the first few steps."""
ENGLISH = (0.0, 0.05, 0.1, 0.25)
FIRST_SCALE, FIRST_ROWS_SCALE = 10.0, 3.0
"""Where the searches for learning rates begin: factors on the plans' rates."""
BEHIND = ("lora", "eeve", "sequential", "badam")
"""Schedules that are behind RedWhale's at equal tokens."""
SWEEP_SEED = 100
"""Not among the seeds that conclusions are drawn from."""


def learning_rates(prepared: Prepared) -> dict[str, Any]:
    """Factors on the plans' learning rates, by bits per byte on text that is for tuning.

    The factor of embedding and head is found on a stage that trains them alone, as long as RedWhale's first one, and
    holds for all schedules; with it, each schedule has a factor of its own for layers and adapters. Each search tries
    the first factor, three times as much, and then nine times as much or a third, on the better side.
    """
    sizes = prepared.sizes

    def bits(schedule: str, lr_scale: float, rows_scale: float, share: float = 1.0) -> float:
        condition = Condition(
            schedule=schedule,
            tokens=round(share * sizes.sweep_tokens),
            lr_scale=lr_scale,
            rows_scale=rows_scale,
            added=sizes.usual_added,
            domains=("tuning",),
        )
        return run_of(prepared, condition, SWEEP_SEED)["after"]["tuning"]["bits_per_byte"]

    rows = _searched(FIRST_ROWS_SCALE, lambda scale: bits(ROWS, scale, scale, 0.25))
    found = {
        schedule: _searched(FIRST_SCALE, lambda scale, schedule=schedule: bits(schedule, scale, rows["scale"]))
        for schedule in SCHEDULES
    }
    return {
        "seed": SWEEP_SEED,
        "tokens": sizes.sweep_tokens,
        "rows": rows,
        "schedules": found,
        "comparisons": [],
    }


def _searched(first: float, bits: Callable[[float], float]) -> dict[str, Any]:
    tried = {scale: bits(scale) for scale in (first, 3 * first)}
    farther = 9 * first if tried[3 * first] < tried[first] else first / 3
    tried[farther] = bits(farther)
    best = min(tried, key=lambda scale: tried[scale])
    return {"scale": best, "tuning_bits_per_byte": {f"{scale:.3g}": tried[scale] for scale in sorted(tried)}}


class Scales(msgspec.Struct, frozen=True):
    """What `learning_rates` found."""

    rows: float
    layers: Mapping[str, float]
    """By schedule."""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Scales:
        layers = {name: one["scale"] for name, one in result["schedules"].items()}
        return cls(result["rows"]["scale"], {**layers, ROWS: result["rows"]["scale"]})


def schedules(prepared: Prepared, scales: Scales, budget: str) -> dict[str, Any]:
    """Schedules at the same "tokens", or at the "flops" of full fine-tuning, for which `BEHIND` is left out."""
    sizes = prepared.sizes
    factor, names = dict.fromkeys(SCHEDULES, 1.0), list(SCHEDULES)
    if budget == "flops":
        factor = equal_flops(prepared.root)
        names = [name for name in SCHEDULES if name not in BEHIND]
    step = sizes.batch_size * sizes.sequence_length
    conditions = {
        name: _usual(prepared, scales, schedule=name, tokens=round(factor[name] * sizes.tokens / step) * step)
        for name in names
    }
    result = measured_conditions(prepared, conditions)
    pairs = [("redwhale", other) for other in conditions if other != "redwhale"]
    result["comparisons"] = _comparisons(result, pairs, f"schedules at equal {budget}")
    result["tokens_for_one_of_full"] = factor
    return result


def replay(prepared: Prepared, scales: Scales) -> dict[str, Any]:
    """Shares of English text in the training data."""
    conditions = {f"{share:.0%}": _usual(prepared, scales, english=share) for share in ENGLISH}
    result = measured_conditions(prepared, conditions)
    comparisons = []
    for share in list(conditions)[1:]:
        for domain in ("korean", "wikipedia", "stories"):
            comparisons += _comparisons(result, [(share, "0%")], f"replay, {domain}", domain=domain)
    return {**result, "comparisons": comparisons}


def vocabulary(prepared: Prepared, scales: Scales) -> dict[str, Any]:
    """Numbers of added pieces, each trained with the FLOPs that the usual number takes, head included."""
    sizes = prepared.sizes
    step = sizes.batch_size * sizes.sequence_length
    flops = {added: _full_flops(prepared, added) for added in sizes.added}
    conditions = {}
    for added in sizes.added:
        tokens = round(sizes.tokens * flops[sizes.usual_added] / flops[added] / step) * step
        conditions[f"{added}"] = _usual(prepared, scales, added=added, tokens=tokens)
    result = measured_conditions(prepared, conditions)
    usual = f"{sizes.usual_added}"
    result["comparisons"] = _comparisons(
        result, [(name, usual) for name in conditions if name != usual], "vocabulary at equal compute"
    )
    result["sizes"] = {
        str(added): {
            "added": prepared.pieces(added),
            "flops_per_token": flops[added],
            "tokens": conditions[str(added)].tokens,
            "bytes_per_token": _bytes_per_token(prepared, added),
        }
        for added in sizes.added
    }
    return result


def filtering(prepared: Prepared, scales: Scales) -> dict[str, Any]:
    """Raw text, and what the filter keeps of it, at the same tokens."""
    conditions = {name: _usual(prepared, scales, corpus=name) for name in ("filtered", "raw")}
    result = measured_conditions(prepared, conditions)
    result["comparisons"] = _comparisons(result, [("filtered", "raw")], "filtering at equal tokens")
    result["diversity"] = {name: prepared.diversity(name) for name in conditions}
    return result


def initialisation(prepared: Prepared, scales: Scales) -> dict[str, Any]:
    """Methods for the new rows, before training and along the stage that trains embedding and head."""
    sizes = prepared.sizes
    step = sizes.batch_size * sizes.sequence_length
    conditions = {
        name: _usual(prepared, scales, init=name, schedule=ROWS, tokens=INIT_STEPS * step, curve=INIT_CURVE)
        for name in INITS
    }
    result = measured_conditions(prepared, conditions)
    comparisons = []
    for when in ("before", "after"):
        pairs = [("decomposition", other) for other in INITS if other != "decomposition"]
        comparisons += _comparisons(result, pairs, f"initialisation {when} training", when=when)
    return {**result, "comparisons": comparisons}


def measured_conditions(prepared: Prepared, conditions: Mapping[str, Condition]) -> dict[str, Any]:
    """Runs of all conditions from every seed, and their means."""
    described = {}
    for name, condition in conditions.items():
        runs = [run_of(prepared, condition, seed) for seed in prepared.sizes.seeds]
        summary = {}
        for when in ("before", "after"):
            for domain in runs[0][when]:
                for metric in ("bits_per_byte", "loss", "accuracy"):
                    values = [run[when][domain][metric] for run in runs]
                    summary[f"{when} {domain} {metric}"] = msgspec.to_builtins(spread(values))
        shown = [{key: run[key] for key in ("seed", "curve", "stages")} for run in runs]
        described[name] = {"condition": msgspec.to_builtins(condition), **summary, "runs": shown}
    return {"seeds": prepared.sizes.seeds, "conditions": described}


def _usual(prepared: Prepared, scales: Scales, *, schedule: str = "redwhale", **other: Any) -> Condition:
    sizes = prepared.sizes
    return Condition(
        schedule=schedule,
        lr_scale=scales.layers[schedule],
        rows_scale=scales.rows,
        **{"tokens": sizes.tokens, "added": sizes.usual_added, **other},
    )


def _comparisons(
    result: Mapping[str, Any],
    pairs: list[tuple[str, str]],
    name: str,
    *,
    when: str = "after",
    domain: str = "korean",
    metric: str = "bits_per_byte",
) -> list[dict[str, Any]]:
    key = f"{when} {domain} {metric}"

    def values(condition: str) -> tuple[str, list[float]]:
        return condition, result["conditions"][condition][key]["values"]

    found: list[Comparison] = [
        compared(f"{name}: {first} against {second}", values(first), values(second), key) for first, second in pairs
    ]
    return [msgspec.to_builtins(one) for one in found]


def _full_flops(prepared: Prepared, added: int) -> float:
    """FLOPs of a token when everything trains, attention over half a sequence included."""
    model = load_model(prepared.initial(added, "decomposition", 0))
    flops = training_flops(model.config, select_parameters(model, ("all",)))
    return flops.per_token + flops.per_pair * (prepared.sizes.sequence_length + 1) / 2


def _bytes_per_token(prepared: Prepared, added: int) -> float:
    texts = prepared.heldout()["korean"]
    tokens = sum(map(len, prepared.tokenizer(added).encode_batch(texts)))
    return sum(len(text.encode()) for text in texts) / tokens

"""Time of a KoBEST task here and in lm-evaluation-harness with transformers, on the same CPU and weights in fp32.

Items are scored in slices, each by both in turn, so that what else the machine does falls on both alike. Timed is
everything from prompts as text to log-likelihoods: tokenisation, forward passes and scores; not the loading of weights
and files. Both start from the same slice, both see its longest texts first, and the log-likelihoods must agree.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import parser, write_result
from kobest_parity import export

from redwhale.engine.choice_scoring import encode_requests, log_likelihoods, score_continuations
from redwhale.engine.few_shot import with_examples
from redwhale.engine.kobest import KOBEST_TASKS, read_task
from redwhale.engine.multiple_choice import MultipleChoiceItem, choices_of
from redwhale.model import Llama, load_model
from redwhale.tokenizer import Tokenizer


def main() -> None:
    """Measure and write the result."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    options = _options()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        export(options.checkpoint, folder)
        pool = read_task(options.kobest, options.task, "train") if options.shots else []
        items = with_examples(read_task(options.kobest, options.task), pool, options.shots)
        step = max(1, len(items) // options.items)
        items = items[::step][: options.items]
        model, tokenizer = load_model(folder), Tokenizer(folder / "tokenizer.model")
        harness = HFLM(
            pretrained=str(folder), device="cpu", dtype="float32", batch_size=options.batch_size, add_bos_token=True
        )
        measured = measure(model, tokenizer, harness, items, options.slice, options.without_sharing)
    data = [options.checkpoint, options.kobest]
    settings = {
        **{key: getattr(options, key) for key in ("task", "shots", "slice", "batch_size")},
        "threads": torch.get_num_threads(),
        "lm_eval": lm_eval.__version__,
    }
    write_result(options.result, __file__, {**settings, **measured}, data=data)


def _options() -> argparse.Namespace:
    made = parser(__doc__, "evaluate-cpu")
    made.add_argument("checkpoint", type=Path, help="Hugging Face folder with tokenizer.model")
    made.add_argument("kobest", type=Path, help="folder with TASK/{train,test}.tsv or .jsonl")
    made.add_argument("--task", choices=KOBEST_TASKS, default="boolq")
    made.add_argument("--shots", type=int, default=0)
    made.add_argument("--items", type=int, default=1404, help="evenly from the whole task (default: %(default)s)")
    made.add_argument("--slice", type=int, default=16, help="items scored by one, then by the other")
    made.add_argument(
        "--batch-size", type=int, default=1, help="requests in a batch of the harness (default: %(default)s)"
    )
    made.add_argument("--without-sharing", action="store_true", help="also measure this engine without shared contexts")
    return made.parse_args()


def measure(
    model: Llama, tokenizer: Tokenizer, harness: Any, items: list[MultipleChoiceItem], size: int, without_sharing: bool
) -> dict[str, Any]:
    """Seconds of both, ratios slice by slice, and how far they agree."""
    from lm_eval.api.instance import Instance

    def ours(some: list[MultipleChoiceItem]) -> list[float]:
        return [value for values in log_likelihoods(model, tokenizer, some) for value in values]

    def unshared(some: list[MultipleChoiceItem]) -> list[float]:
        requests = encode_requests(tokenizer, [(item.context, choice) for item in some for choice in item.choices])
        return [score.log_likelihood for score in score_continuations(model, requests, share_prefixes=False)]

    def theirs(some: list[MultipleChoiceItem]) -> list[float]:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=(item.context, choice), idx=0)
            for item in some
            for choice in item.choices
        ]
        return [float(value) for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    def choices(some: list[MultipleChoiceItem], values: list[float]) -> list[int]:
        left = iter(values)
        return choices_of([[next(left) for _ in item.choices] for item in some])

    calls = {"redwhale": ours, "lm_eval": theirs, **({"without_sharing": unshared} if without_sharing else {})}
    for warm in calls.values():
        warm(items[:1])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    apart = 0.0
    different = 0
    for begin in range(0, len(items), size):
        some = items[begin : begin + size]
        found = {}
        for name, call in calls.items():
            began = time.perf_counter()
            found[name] = call(some)
            seconds[name].append(time.perf_counter() - began)
        apart = max(apart, *(abs(a - b) for a, b in zip(found["redwhale"], found["lm_eval"], strict=True)))
        different += sum(
            a != b for a, b in zip(choices(some, found["redwhale"]), choices(some, found["lm_eval"]), strict=True)
        )
        so_far = {name: round(sum(values), 1) for name, values in seconds.items()}
        print(f"{begin + len(some)} of {len(items)} items", so_far, flush=True)
    ratios = [a / b for a, b in zip(seconds["lm_eval"], seconds["redwhale"], strict=True)]
    totals = {name: sum(values) for name, values in seconds.items()}
    return {
        "items": len(items),
        "seconds": {name: round(total, 2) for name, total in totals.items()},
        **{
            f"{name}_over_redwhale": round(totals[name] / totals["redwhale"], 2) for name in calls if name != "redwhale"
        },
        "median_of_slices": round(statistics.median(ratios), 2),
        "lowest_slice": round(min(ratios), 2),
        "largest_difference_nats": apart,
        "different_choices": different,
    }


if __name__ == "__main__":
    main()

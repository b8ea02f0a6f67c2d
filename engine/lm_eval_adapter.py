"""Any task of lm-evaluation-harness on this engine, where the `lm_eval` package is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-not-found]
import lm_eval  # type: ignore[import-not-found]
from lm_eval.api.instance import Instance  # type: ignore[import-not-found]
from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
from lm_eval.api.task import ConfigurableTask  # type: ignore[import-not-found]
from lm_eval.tasks._yaml_loader import load_yaml  # type: ignore[import-not-found]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-not-found]

from ..model import Llama
from ..tokenizer import Tokenizer
from .choice_scoring import TokenRequest, score_continuations
from .kobest import read_documents
from .text_generation import generate_texts

_HUB_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


class EngineLM(TemplateLM):
    """A model of this package as lm-evaluation-harness asks one; it is no process of a distributed run.

    Args:
        model: any model of this package.
        tokenizer: the one it was trained with.
        max_tokens: most tokens in one forward pass.
        batch_size: texts generated at a time.
        max_new_tokens: of a task that sets no limit of its own.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        max_tokens: int = 4096,
        batch_size: int = 8,
        max_new_tokens: int = 256,
    ) -> None:
        super().__init__()
        self.model, self.sentencepiece = model, tokenizer
        self.max_tokens, self.batch_size, self.max_new_tokens = max_tokens, batch_size, max_new_tokens

    @property
    def eot_token_id(self) -> int:
        return self.sentencepiece.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.sentencepiece.bos_id if self.sentencepiece.bos_id >= 0 else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads."""
        return self.model.config.context_length

    @property
    def max_gen_toks(self) -> int:
        return self.max_new_tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, behind the beginning-of-text token unless `add_special_tokens` is False."""
        ids = self.sentencepiece.encode(string)
        bos = self.sentencepiece.bos_id
        return ids if add_special_tokens is False or bos < 0 else [bos, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        tokens = [TokenRequest(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        scores = score_continuations(self.model, tokens, max_tokens=self.max_tokens)
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, in windows of the model's context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, rolled):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text behind each prompt up to a stop string; a prompt loses its beginning where there is no room."""
        answers = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        by_settings: dict[Any, list[int]] = {}
        for place, request in enumerate(requests):
            by_settings.setdefault(_generation_settings(request.args[1], self.max_new_tokens), []).append(place)
        for (limit, stops, temperature, top_p), places in by_settings.items():
            room = min(limit, self.max_length - 1)
            places.sort(key=lambda place: -len(prompts[place]))
            for begin in range(0, len(places), self.batch_size):
                batch = places[begin : begin + self.batch_size]
                texts = generate_texts(
                    self.model,
                    self.sentencepiece,
                    [prompts[place][-(self.max_length - room) :] for place in batch],
                    stop=stops,
                    max_new_tokens=room,
                    temperature=temperature,
                    top_p=top_p,
                )
                for place, text in zip(batch, texts, strict=True):
                    answers[place] = text
        return answers


def _generation_settings(given: Mapping[str, Any], most: int) -> tuple[int, tuple[str, ...], float, float]:
    """(new tokens, stop strings, temperature, top_p) of a task's `generation_kwargs`."""
    until = given.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(stop for stop in until if stop)
    sampling = given.get("do_sample", float(given.get("temperature") or 0.0) > 0)
    temperature = float(given.get("temperature") or 1.0) if sampling else 0.0
    limit = int(given.get("max_gen_toks") or given.get("max_new_tokens") or most)
    return limit, stops, temperature, float(given.get("top_p") or 1.0)


def run_tasks(model: EngineLM, tasks: Sequence[Any], *, shots: int = 0, limit: int | None = None) -> dict[str, Any]:
    """Metrics by task, as lm-evaluation-harness computes them.

    Args:
        model: to evaluate.
        tasks: names that the harness knows, or tasks such as those of `kobest_task`.
        shots: solved examples before each question.
        limit: only so many items of each task.
    """
    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), num_fewshot=shots, limit=limit, bootstrap_iters=0)
    return {
        task: {metric.partition(",")[0]: value for metric, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }


def kobest_task(folder: Path, task: str) -> ConfigurableTask:
    """The harness's own task `kobest_TASK`, prompts and metrics included, with its documents read from TSV files.

    Args:
        folder: with TASK/{train,dev,test}.tsv.
        task: one of `KOBEST_TASKS`.
    """
    config = load_yaml(
        Path(str(lm_eval.__file__)).parent / "tasks" / "kobest" / f"kobest_{task}.yaml", resolve_func=True
    )
    for key in ("dataset_path", "dataset_name", "group"):
        config.pop(key, None)
    # The harness would ask the hub for the code of a metric that it has itself.
    metrics = [{k: v for k, v in metric.items() if k != "hf_evaluate"} for metric in config.pop("metric_list")]
    return ConfigurableTask(
        config={**config, "metric_list": metrics, "metadata": {}, "custom_dataset": partial(_documents, folder, task)}
    )


def _documents(folder: Path, task: str) -> dict[str, datasets.Dataset]:
    return {
        split: datasets.Dataset.from_list(read_documents(folder, task, file)) for split, file in _HUB_SPLITS.items()
    }

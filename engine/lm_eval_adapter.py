"""Any task of lm-evaluation-harness on this engine, where the `lm_eval` package is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..model import Llama
from ..tokenizer import Tokenizer
from .choice_scoring import TokenRequest, score_continuations
from .errors import RecipeError, RunError
from .kobest import read_documents
from .text_generation import generate_texts

_RESAMPLES = 1000
"""Of the bootstrap, for standard errors of metrics that are no means."""
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
            # With its own beginning-of-text token, which is predicted too: as the harness does with transformers.
            ids = self.tok_encode(str(request.arguments[0]))
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
        prompts = [self.tok_encode(str(request.arguments[0])) for request in requests]
        by_settings: dict[Any, list[int]] = {}
        for place, request in enumerate(requests):
            by_settings.setdefault(_generation_settings(request.arguments[1], self.max_new_tokens), []).append(place)
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
                    answer=True,
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


# Its decorator hides the signature from type checkers.
_evaluate: Callable[..., Any] = lm_eval.simple_evaluate


@cache
def _task_manager(include: str | None) -> TaskManager:
    """The harness reads thousands of task files to make one."""
    return TaskManager(include_path=include)


def check_tasks(tasks: Sequence[str], include: str | None = None) -> None:
    """Raise RecipeError for a task that neither the harness nor the folder `include` has, or if that is no folder."""
    if include is not None and not Path(include).is_dir():
        raise RecipeError(f"eval.lm_eval_include = {include!r} is no folder; give one that holds task files")
    manager = _task_manager(include)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise RecipeError(f"lm_eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists those it has")


def run_tasks(
    model: EngineLM,
    tasks: Sequence[Any],
    *,
    shots: int | None = None,
    limit: int | None = None,
    include: str | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics by task and group, as lm-evaluation-harness computes them; a filter other than "none" is named.

    Args:
        model: to evaluate.
        tasks: names that the harness knows, or tasks such as those of `kobest_task`.
        shots: solved examples before each question; None for what each task asks for.
        limit: only so many items of each task.
        include: folder with more task files.

    Raises:
        RunError: if a task's data cannot be read; the harness gets it from the hub unless its file says otherwise.
    """
    try:
        found = _evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            task_manager=_task_manager(include),
        )
    except OSError as error:
        raise RunError(f"lm_eval cannot read the data of {', '.join(map(str, tasks))}: {error}") from error
    return {
        task: {_metric_name(key): value for key, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in {**found["results"], **found.get("groups", {})}.items()
    }


def _metric_name(key: str) -> str:
    """ "acc" of "acc,none", "exact_match (strict)" of "exact_match,strict"."""
    metric, _, filtered = key.partition(",")
    return metric if filtered in ("", "none") else f"{metric} ({filtered})"


def kobest_task(folder: Path, task: str) -> ConfigurableTask:
    """The harness's own task `kobest_TASK`, prompts and metrics included, with its documents read from local files.

    Args:
        folder: with TASK/{train,dev,test}.tsv or .jsonl.
        task: one of `KOBEST_TASKS`.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

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

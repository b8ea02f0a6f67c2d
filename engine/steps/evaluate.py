"""Step `eval`: the run's checkpoints on held-out text, KoBEST, the user's questions, and tasks of lm_eval."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...model import Llama
from ...tokenizer import Tokenizer
from ..chat_templates import ChatTemplate, stored_template
from ..choice_scoring import log_likelihoods
from ..errors import RecipeError
from ..evaluation import evaluate_text
from ..few_shot import with_examples
from ..kobest import MultipleChoiceItem, choices_of, read_task, score, score_choices
from ..paper_results import kobest_means, results_table, task_shots
from ..progress import Progress
from ..qa import (
    GradedAnswer,
    Question,
    answer_questions,
    choice_items,
    graded_summary,
    read_questions,
    write_grading_file,
)
from ..recipe import EvalConfig
from ..run_folder import StepResult
from ..statistics import compare_paired
from .context import Context, Unit, config_of

_ITEMS, _TABLE = "items.jsonl", "results.md"


def units(context: Context) -> list[Unit]:
    """One unit where the recipe evaluates."""
    config = context.recipe.eval
    if config is None:
        return []

    def inputs() -> dict[str, str]:
        hashes = context.heldout_hashes()
        makers = {"base": context.base_hashes, "init": context.initial_hashes, "train": context.trained_hashes}
        for name, hashes_of in {**makers, "sft": context.final_hashes}.items():
            if name in config.checkpoints:
                hashes.update(hashes_of())
        if context.recipe.filter is not None:
            hashes["filter"] = context.outputs_digest("filter")
        files = [Path(path) for questions in config.qa.values() for path in questions.data]
        if config.kobest is not None:
            for split in {config.kobest_split, *(["train"] if any(config.kobest_shots) else [])}:
                files += sorted(Path(config.kobest).glob(f"*/{split}.tsv"))
        hashes.update(context.file_hashes(files))
        return hashes

    def check() -> None:
        context.check_heldout()
        _kobest_items(config)
        _read_questions(config)
        if config.lm_eval and importlib.util.find_spec("lm_eval") is None:
            raise RecipeError("eval.lm_eval needs the lm_eval package: pip install lm_eval, or leave the key out")

    described = config_of(config, precision=context.precision)
    return [Unit("eval", "eval", described, inputs, lambda folder: run_eval(context, folder), check)]


def _checkpoints(context: Context) -> Iterator[tuple[str, Path, Tokenizer]]:
    config, recipe = context.recipe.eval, context.recipe
    assert config is not None
    if "base" in config.checkpoints:
        yield "base", context.base_model, Tokenizer(context.base_tokenizer)
    places = {
        "init": (recipe.init, context.initial_model),
        "train": (recipe.train, context.trained_model),
        "sft": (recipe.sft, context.final_model),
    }
    for name, (section, folder) in places.items():
        if name in config.checkpoints and section is not None:
            yield name, folder, context.tokenizer()


def _kobest_items(config: EvalConfig) -> dict[str, list[MultipleChoiceItem]]:
    """Items by task; a task with examples is called such as "boolq 5-shot"."""
    tasks: dict[str, list[MultipleChoiceItem]] = {}
    if config.kobest is None:
        return tasks
    folder = Path(config.kobest)
    for shots, task in itertools.product(config.kobest_shots, config.kobest_tasks):
        items = read_task(folder, task, config.kobest_split)[: config.kobest_items]
        pool = read_task(folder, task, "train") if shots else []
        tasks[f"{task} {shots}-shot" if shots else task] = with_examples(items, pool, shots)
    return tasks


def _read_questions(config: EvalConfig) -> dict[str, list[Question]]:
    return {name: read_questions(questions.data) for name, questions in config.qa.items()}


def run_eval(context: Context, folder: Path) -> StepResult:
    """Measure every checkpoint asked for, then compare each with the one before it, item by item."""
    config = context.recipe.eval
    assert config is not None
    heldout = context.heldout_texts(config.documents)
    tasks, questions = _kobest_items(config), _read_questions(config)
    checkpoints = list(_checkpoints(context))
    results: dict[str, Any] = {}
    right: dict[str, dict[str, list[bool]]] = {}
    answers: dict[str, dict[str, Sequence[GradedAnswer]]] = {name: {} for name in questions}
    sets = len(heldout) + len(tasks) + len(questions) + bool(config.lm_eval)
    with (
        Progress("eval", len(checkpoints) * sets, " sets") as progress,
        (folder / _ITEMS).open("w", encoding="utf-8") as log,
    ):
        for name, model_folder, tokenizer in checkpoints:
            model = context.load(model_folder, tokenizer)
            results[name] = measured = {"text": {}, "kobest": {}}
            right[name] = {}
            for domain, texts in heldout.items():
                result = evaluate_text(model, tokenizer, texts, window=config.window, batch_size=config.batch_size)
                measured["text"][domain] = msgspec.to_builtins(result)
                progress.update(1, checkpoint=name)
            max_tokens = config.batch_size * config.window
            for task, items in tasks.items():
                scores = log_likelihoods(model, tokenizer, items, max_tokens=max_tokens)
                measured["kobest"][task] = msgspec.to_builtins(score(items, scores, task=task.partition(" ")[0]))
                right[name][task] = _log(log, name, task, items, scores)
                progress.update(1, checkpoint=name)
            if tasks:
                measured["kobest_mean"] = _means(measured["kobest"])
            for title, asked in questions.items():
                measured.setdefault("qa", {})
                if asked[0].choices:
                    items = choice_items(asked, config.qa[title].prompt)
                    scores = log_likelihoods(model, tokenizer, items, max_tokens=max_tokens)
                    measured["qa"][title] = msgspec.to_builtins(score_choices(items, scores, name=title))
                    right[name][title] = _log(log, name, title, items, scores)
                else:
                    template = stored_template(model_folder) if name == "sft" else None
                    chat = ChatTemplate(template, tokenizer) if template is not None else None
                    graded = _answers(model, tokenizer, asked, config, title, chat)
                    answers[title][name] = graded
                    measured["qa"][title] = graded_summary(graded)
                progress.update(1, checkpoint=name)
            if config.lm_eval:
                measured["lm_eval"] = _lm_eval(model, tokenizer, config)
                progress.update(1, checkpoint=name)
    for title, by_checkpoint in answers.items():
        if by_checkpoint:
            write_grading_file(folder / f"qa-{title}.csv", by_checkpoint)
    if tasks and results:
        (folder / _TABLE).write_text(results_table(results), encoding="utf-8")
    shown = [
        f"{domain} " + " → ".join(f"{results[name]['text'][domain]['bits_per_byte']:.2f}" for name in results)
        for domain in heldout
    ]
    return StepResult(
        summary={"checkpoints": results, "comparisons": _comparisons(right), "change_from_base": _changes(results)},
        outputs=[],
        went_in=f"{', '.join(results)} on {sum(map(len, heldout.values())):,} held-out documents",
        came_out="bits per byte: " + "; ".join(shown),
    )


def _log(log: Any, checkpoint: str, task: str, items: Sequence[MultipleChoiceItem], scores: Any) -> list[bool]:
    """Write a line an item; gives whether each is right."""
    chosen = choices_of(scores)
    for number, (item, values, choice) in enumerate(zip(items, scores, chosen, strict=True)):
        line = {"checkpoint": checkpoint, "task": task, "item": number, "gold": item.gold, "choice": choice}
        log.write(json.dumps({**line, "log_likelihoods": [round(value, 6) for value in values]}) + "\n")
    return [item.gold == choice for item, choice in zip(items, chosen, strict=True)]


def _answers(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    config: EvalConfig,
    title: str,
    template: ChatTemplate | None,
) -> list[GradedAnswer]:
    settings = config.qa[title]
    return answer_questions(
        model,
        tokenizer,
        questions,
        grading=settings.grading,
        prompt=settings.prompt,
        template=template,
        max_new_tokens=settings.max_new_tokens,
        batch_size=config.batch_size,
    )


def _lm_eval(model: Llama, tokenizer: Tokenizer, config: EvalConfig) -> dict[str, Any]:
    from ..lm_eval_adapter import EngineLM, run_tasks

    adapter = EngineLM(model, tokenizer, max_tokens=config.batch_size * config.window, batch_size=config.batch_size)
    return run_tasks(adapter, config.lm_eval, shots=config.lm_eval_shots, limit=config.lm_eval_items)


def _means(tasks: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Means over the tasks of one number of examples, by that number."""
    shots = dict.fromkeys(map(task_shots, tasks))
    return {shot: kobest_means({t: found for t, found in tasks.items() if task_shots(t) == shot}) for shot in shots}


def _comparisons(right: dict[str, dict[str, list[bool]]]) -> list[dict[str, Any]]:
    """Each checkpoint against the one before it, and the last against the first."""
    names = list(right)
    pairs = list(itertools.pairwise(names))
    if len(names) > 2:
        pairs.append((names[0], names[-1]))
    return [
        {
            "first": first,
            "second": second,
            "task": task,
            **msgspec.to_builtins(compare_paired(right[first][task], right[second][task])),
        }
        for first, second in pairs
        for task in right[first]
    ]


def _changes(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Bits per byte above the base's by checkpoint and domain: what was forgotten where it is positive."""
    if "base" not in results:
        return {}
    base = results["base"]["text"]
    return {
        name: {domain: found["bits_per_byte"] - base[domain]["bits_per_byte"] for domain, found in r["text"].items()}
        for name, r in results.items()
        if name != "base"
    }

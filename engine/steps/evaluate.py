"""Step `eval`: checkpoints on held-out text, KoBEST, the user's questions, and tasks of lm_eval."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import msgspec

from ...model import Llama, read_config
from ...tokenizer import Tokenizer
from ..chat_templates import ChatTemplate, stored_template
from ..choice_scoring import log_likelihoods
from ..errors import RecipeError
from ..eval_config import EvalConfig
from ..evaluation import evaluate_text
from ..evaluation_tables import evaluation_tables, markdown, means_by_shots
from ..few_shot import with_examples
from ..grading_sheet import write_grading_file
from ..kobest import find_task_file, read_task, score
from ..multiple_choice import MultipleChoiceItem, choices_of, score_choices
from ..progress import Progress
from ..qa import GradedAnswer, Question, answer_questions, choice_items, graded_summary, read_questions
from ..run_folder import StepResult
from ..statistics import compare_paired
from .context import Context, Unit, config_of

_ITEMS, _TABLES = "items.jsonl", "results.md"


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
        for folder in map(Path, config.others.values()):
            hashes.update(context.checkpoint_hashes(folder, folder / "tokenizer.model"))
        if context.recipe.filter is not None:
            hashes["filter"] = context.outputs_digest("filter")
        files = [Path(path) for questions in config.qa.values() for path in questions.data]
        if config.kobest is not None:
            splits = {config.kobest_split, *(["train"] if any(config.kobest_shots) else [])}
            pairs = itertools.product(config.kobest_tasks, sorted(splits))
            files += [find_task_file(Path(config.kobest), task, split) for task, split in pairs]
        if config.lm_eval_include is not None:
            files += sorted(path for path in Path(config.lm_eval_include).rglob("*") if path.is_file())
        hashes.update(context.file_hashes(files))
        return hashes

    def check() -> None:
        context.check_heldout()
        for name, folder in config.others.items():
            read_config(Path(folder))
            if not (Path(folder) / "tokenizer.model").is_file():
                raise RecipeError(f"eval.others.{name} = {folder!r} has no tokenizer.model: put its own beside it")
        _kobest_items(config)
        _read_questions(config)
        if config.lm_eval:
            _lm_eval_adapter().check_tasks(config.lm_eval, config.lm_eval_include)

    described = config_of(config, precision=context.precision)
    return [Unit("eval", "eval", described, inputs, lambda folder: run_eval(context, folder), check)]


class _Material(NamedTuple):
    """What every checkpoint is measured on."""

    texts: Mapping[str, Sequence[str]]
    """Held-out documents by domain."""
    tasks: Mapping[str, Sequence[MultipleChoiceItem]]
    """Items of KoBEST by task; a task with examples is called such as "boolq 5-shot"."""
    questions: Mapping[str, Sequence[Question]]
    """The user's questions by name."""

    @property
    def sets(self) -> int:
        return len(self.texts) + len(self.tasks) + len(self.questions)


class _Measured(NamedTuple):
    """What one checkpoint got."""

    summary: dict[str, Any]
    right: dict[str, list[bool]]
    """Whether each item is right, by KoBEST task and set of questions."""
    answers: dict[str, list[GradedAnswer]]
    """To open questions, by set."""


def run_eval(context: Context, folder: Path) -> StepResult:
    """Measure every checkpoint asked for, then compare them item by item."""
    config = context.recipe.eval
    assert config is not None
    material = _Material(context.heldout_texts(config.documents), _kobest_items(config), _read_questions(config))
    checkpoints = list(_checkpoints(context))
    measured: dict[str, _Measured] = {}
    with (
        Progress("eval", len(checkpoints) * (material.sets + bool(config.lm_eval)), " sets") as progress,
        (folder / _ITEMS).open("w", encoding="utf-8") as log,
    ):
        for name, model_folder, tokenizer in checkpoints:
            model = context.load(model_folder, tokenizer)
            template = stored_template(model_folder)
            chat = ChatTemplate(template, tokenizer) if template is not None else None
            measured[name] = _measure(name, model, tokenizer, chat, material, config, log, progress)
            del model  # one is in memory at a time
    for title in material.questions:
        answers = {name: found.answers[title] for name, found in measured.items() if title in found.answers}
        if answers:
            write_grading_file(folder / f"qa-{title}.csv", answers)
    results = {name: found.summary for name, found in measured.items()}
    summary = {
        "checkpoints": results,
        "comparisons": _comparisons({name: found.right for name, found in measured.items()}, list(config.others)),
        "change_from_base": _changes(results),
    }
    (folder / _TABLES).write_text(markdown(evaluation_tables(summary)), encoding="utf-8")
    return StepResult(
        summary=summary,
        outputs=[],
        went_in=f"{', '.join(results)} on {sum(map(len, material.texts.values())):,} held-out documents",
        came_out=_shown(results, list(material.texts)),
    )


def _checkpoints(context: Context) -> Iterator[tuple[str, Path, Tokenizer]]:
    """(name, folder, tokenizer), those of the run first."""
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
    for name, folder in config.others.items():
        yield name, Path(folder), Tokenizer(Path(folder) / "tokenizer.model")


def _kobest_items(config: EvalConfig) -> dict[str, list[MultipleChoiceItem]]:
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


def _measure(
    name: str,
    model: Llama,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    material: _Material,
    config: EvalConfig,
    log: TextIO,
    progress: Progress,
) -> _Measured:
    """Measure one checkpoint on everything, and log its choices item by item."""
    found = _Measured({"text": {}, "kobest": {}}, {}, {})
    summary = found.summary
    max_tokens = config.batch_size * config.window

    def choose(title: str, items: Sequence[MultipleChoiceItem]) -> list[list[float]]:
        scores = log_likelihoods(model, tokenizer, items, max_tokens=max_tokens)
        found.right[title] = _log_choices(log, name, title, items, scores)
        return scores

    for domain, texts in material.texts.items():
        result = evaluate_text(model, tokenizer, texts, window=config.window, batch_size=config.batch_size)
        summary["text"][domain] = msgspec.to_builtins(result)
        progress.update(1, checkpoint=name)
    for task, items in material.tasks.items():
        scores = choose(task, items)
        summary["kobest"][task] = msgspec.to_builtins(score(items, scores, task=task.partition(" ")[0]))
        progress.update(1, checkpoint=name)
    if material.tasks:
        summary["kobest_mean"] = means_by_shots(summary["kobest"])
    if material.questions:
        summary["qa"] = {}
    for title, questions in material.questions.items():
        settings = config.qa[title]
        if questions[0].choices:
            items = choice_items(questions, settings.prompt)
            summary["qa"][title] = msgspec.to_builtins(score_choices(items, choose(title, items), name=title))
        else:
            graded = answer_questions(
                model,
                tokenizer,
                questions,
                grading=settings.grading,
                prompt=settings.prompt,
                template=chat,
                max_new_tokens=settings.max_new_tokens,
                batch_size=config.batch_size,
            )
            found.answers[title] = graded
            summary["qa"][title] = {"grading": settings.grading, **graded_summary(graded)}
            if settings.grading != "f1":  # the others give 0 or 1
                found.right[title] = [answer.score == 1 for answer in graded]
        progress.update(1, checkpoint=name)
    if config.lm_eval:
        adapter = _lm_eval_adapter()
        asked = adapter.EngineLM(model, tokenizer, max_tokens=max_tokens, batch_size=config.batch_size)
        summary["lm_eval"] = adapter.run_tasks(
            asked,
            config.lm_eval,
            shots=config.lm_eval_shots,
            limit=config.lm_eval_items,
            include=config.lm_eval_include,
        )
        progress.update(1, checkpoint=name)
    return found


def _log_choices(
    log: TextIO, checkpoint: str, task: str, items: Sequence[MultipleChoiceItem], scores: Sequence[Sequence[float]]
) -> list[bool]:
    """Write a line an item; gives whether each is right."""
    chosen = choices_of(scores)
    for number, (item, values, choice) in enumerate(zip(items, scores, chosen, strict=True)):
        line = {"checkpoint": checkpoint, "task": task, "item": number, "gold": item.gold, "choice": choice}
        log.write(json.dumps({**line, "log_likelihoods": [round(value, 6) for value in values]}) + "\n")
    return [item.gold == choice for item, choice in zip(items, chosen, strict=True)]


def _lm_eval_adapter() -> Any:
    """The module that needs lm_eval; raises RecipeError where that is not installed."""
    try:
        from .. import lm_eval_adapter
    except ModuleNotFoundError as missing:
        raise RecipeError(
            f'eval.lm_eval needs {missing.name}: pip install "redwhale[lm-eval]", or leave the key out'
        ) from None
    return lm_eval_adapter


def _comparisons(right: Mapping[str, Mapping[str, Sequence[bool]]], others: Sequence[str]) -> list[dict[str, Any]]:
    """Each checkpoint of the run against the one before it, the last against the first and against all others."""
    own = [name for name in right if name not in others]
    pairs = list(itertools.pairwise(own))
    if len(own) > 2:
        pairs.append((own[0], own[-1]))
    pairs += [(name, own[-1]) for name in others] if own else list(itertools.pairwise(others))
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


def _changes(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Bits per byte above the base's by checkpoint and domain: what was forgotten where it is positive."""
    if "base" not in results:
        return {}
    base = results["base"]["text"]
    return {
        name: {domain: found["bits_per_byte"] - base[domain]["bits_per_byte"] for domain, found in r["text"].items()}
        for name, r in results.items()
        if name != "base"
    }


def _shown(results: Mapping[str, Any], domains: Sequence[str]) -> str:
    """The measured numbers in a line, by checkpoint in order."""
    shown = []
    if domains:
        bits = [" → ".join(f"{r['text'][domain]['bits_per_byte']:.2f}" for r in results.values()) for domain in domains]
        shown.append("bits per byte: " + ", ".join(f"{d} {b}" for d, b in zip(domains, bits, strict=True)))
    for shots in next(iter(results.values()), {}).get("kobest_mean", {}):
        means = " → ".join(f"{r['kobest_mean'][shots]['acc']:.1%}" for r in results.values())
        shown.append(f"KoBEST {shots}: {means}")
    return "; ".join(shown)

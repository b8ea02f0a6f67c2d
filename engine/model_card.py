"""The README.md of an exported model: what the run's manifests know about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluation_tables import evaluation_tables, markdown, markdown_table

if TYPE_CHECKING:
    from .steps.context import Context

_STAGE_HEADER = ["stage", "trained", "tokens", "learning rate", "validation loss before", "after"]


def model_card(context: Context) -> str:
    """Base, data, tokenizer, stages and results of a run, as Markdown with the front matter of Hugging Face."""
    recipe = context.recipe
    base = recipe.base.checkpoint
    front = ["---", "language: [ko, en]", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"license: {recipe.export.license}"] if recipe.export is not None and recipe.export.license else []
    front += ["tags: [redwhale, korean]", "---"]
    named = f"`{Path(base).name}`" if base is not None else "a small model pretrained from scratch by the same recipe"
    sections = [
        f"# {recipe.name}",
        f"Made with [RedWhale](https://arxiv.org/abs/2408.11294) from {named}.",
        *_data(context),
        *_stages(context),
        *_chat(context),
        *_results(context),
        _USE,
    ]
    return "\n".join(front) + "\n\n" + "\n\n".join(sections) + "\n"


def adapter_card(context: Context, base: Path) -> str:
    """The README.md of an adapter that is handed over alone."""
    return (
        "---\nlibrary_name: peft\npipeline_tag: text-generation\nlanguage: [ko, en]\n---\n\n"
        f"# {context.recipe.name}, adapter\n\n"
        f"LoRA adapters of [RedWhale](https://arxiv.org/abs/2408.11294), to be put on `{base}`, the model that their "
        "training began with; on another one they mean nothing.\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "adapter")\n```\n'
    )


_USE = (
    "## Use\n\n```python\nfrom transformers import pipeline\n\n"
    'generate = pipeline("text-generation", "path/to/this/folder")\n'
    'print(generate("대한민국의 국회는", max_new_tokens=64)[0]["generated_text"])\n```'
)


def _manifest(context: Context, step: str) -> dict[str, Any] | None:
    return context.run.step(step).manifest()


def _data(context: Context) -> Iterator[str]:
    lines = []
    if context.recipe.filter is not None and (filtered := _manifest(context, "filter")):
        summary = filtered["summary"]
        lines.append(
            f"- Corpus: {summary['documents_out']:,} documents, left by the filter of {summary['documents_in']:,} "
            f"({filtered['went_in']} in, {filtered['came_out']} out)."
        )
    if context.recipe.tokenizer is not None and (made := _manifest(context, "tokenizer")):
        lines.append(f"- Tokenizer: {made['went_in']} became {made['came_out']}.")
    if context.recipe.init is not None and (made := _manifest(context, "init")):
        config = context.recipe.init
        lines.append(f"- New rows: embedding by {config.embedding}, LM head by {config.head}; {made['came_out']}.")
    if context.recipe.pack is not None and (packed := _manifest(context, "pack")):
        lines.append(f"- Tokens: {packed['came_out']}.")
    if context.recipe.sft is not None and (tuned := _manifest(context, "sft")):
        lines.append(f"- Fine-tuning: {tuned['went_in']}, loss on the answers only.")
    if lines:
        yield "## Data\n\n" + "\n".join(lines)


def _stages(context: Context) -> Iterator[str]:
    recipe = context.recipe
    rows = []
    for index, stage in enumerate(recipe.train.all_stages if recipe.train else ()):
        if manifest := _manifest(context, context.stage_name(index)):
            rows.append([stage.name, " + ".join(stage.train), *_training(manifest, stage.lr)])
    if recipe.sft is not None and (manifest := _manifest(context, "sft")):
        rows.append(["sft", " + ".join(recipe.sft.train), *_training(manifest, recipe.sft.lr)])
    if rows:
        yield "## Training\n\n" + markdown_table(_STAGE_HEADER, rows)


def _training(manifest: dict[str, Any], lr: float) -> list[str]:
    losses = ["" if manifest[key] is None else f"{manifest[key]:.4f}" for key in ("before", "after")]
    return [f"{manifest['summary']['tokens']:,}", f"{lr:g}", *losses]


def _chat(context: Context) -> Iterator[str]:
    if context.recipe.sft is not None:
        yield (
            f"## Chat\n\nThe chat template is `{Path(context.recipe.sft.template).name}`, in `tokenizer_config.json`; "
            "`apply_chat_template` and the text-generation pipeline use it."
        )


def _results(context: Context) -> Iterator[str]:
    evaluation = _manifest(context, "eval") if context.recipe.eval is not None else None
    if evaluation and (tables := evaluation_tables(evaluation["summary"])):
        yield "## Results\n\n" + markdown(tables, level=3).rstrip()

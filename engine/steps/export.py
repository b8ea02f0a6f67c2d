"""Step `export`: one folder that Hugging Face tools load, checked after writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...model import CheckpointReader, Llama, PackedDocuments, load_model, write_checkpoint
from ...tokenizer import Tokenizer, export_hf_tokenizer, load_model_proto
from ..errors import CheckpointError
from ..run_folder import StepResult, write_json
from ..sft import CHAT_TEMPLATE
from .context import Context, Unit, check_rows, config_of

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PROBE_TEXT = "대한민국의 모든 국민은 법 앞에 평등하다. All people are equal before the law."
TOLERANCE = 1e-3
"""Largest difference of fp32 logits that still counts as agreement, over the largest logit."""


def units(context: Context) -> list[Unit]:
    """One unit where the recipe exports."""
    config = context.recipe.export
    if config is None:
        return []

    def inputs() -> dict[str, str]:
        # The model card tells the evaluation's results.
        evaluation = context.run.step("eval").manifest() if context.recipe.eval is not None else None
        known = {"eval": evaluation["digest"]} if evaluation else {}
        return {**context.final_hashes(), **context.tokenizer_hashes(), **known}

    described = config_of(config)
    return [Unit("export", "export", described, inputs, lambda folder: run_export(context, folder), context.check_init)]


def run_export(context: Context, folder: Path) -> StepResult:
    """Write weights, tokenizer, chat template, generation config and model card to `folder/model`.

    Raises:
        CheckpointError: if transformers computes other logits from the folder than we do.
    """
    config = context.recipe.export
    assert config is not None
    target = folder / "model"
    check_rows(context.final_model, context.tokenizer())
    reader = CheckpointReader(context.final_model)
    dtype = _DTYPES.get(config.precision)
    write_checkpoint(target, reader.config, ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in reader))
    export_hf_tokenizer(
        load_model_proto(context.tokenizer_folder / "tokenizer.model"),
        target,
        chat_template=CHAT_TEMPLATE if context.recipe.sft is not None else None,
        model_max_length=reader.config.max_position_embeddings,
    )
    generation = {"bos_token_id": reader.config.bos_token_id, "eos_token_id": reader.config.eos_token_id}
    write_json(target / "generation_config.json", generation)
    (target / "README.md").write_text(model_card(context), encoding="utf-8")
    verification = verify(target) if config.verify else None
    if verification is not None and verification["relative_difference"] > TOLERANCE:
        raise CheckpointError(
            f"transformers computes other logits from {target} than redwhale does "
            f"(difference {verification['relative_difference']:.1e} of the largest logit): please report this"
        )
    checked = "not compared (transformers is not installed)"
    if verification is not None:
        checked = f"transformers agrees to {verification['relative_difference']:.0e}"
    elif not config.verify:
        checked = "not compared (verify = false)"
    size = sum(path.stat().st_size for path in target.iterdir())
    return StepResult(
        summary={"verification": verification, "bytes": size},
        outputs=sorted(str(path.relative_to(folder)) for path in target.iterdir()),
        went_in=str(context.final_model),
        came_out=f"{size / 1e6:.1f} MB, {checked}",
    )


@torch.inference_mode()
def verify(folder: Path) -> dict[str, Any] | None:
    """Compare an exported folder under transformers with ours, in fp32; None where transformers is not installed.

    Returns:
        max_difference, relative_difference (over the largest logit) and same_ids, whether both tokenizers agree.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        return None
    tokenizer = Tokenizer(folder / "tokenizer.model")
    ids = [tokenizer.bos_id, *tokenizer.encode(_PROBE_TEXT)]
    theirs_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    expected = theirs(torch.tensor([ids])).logits[0]
    model: Llama = load_model(folder, dtype=torch.float32)
    actual = model(torch.tensor(ids), PackedDocuments.from_lengths([len(ids)]))
    difference = float((actual - expected).abs().max())
    return {
        "max_difference": difference,
        "relative_difference": difference / float(expected.abs().max()),
        "same_ids": theirs_tokenizer(_PROBE_TEXT)["input_ids"] == ids,
        "tokens": len(ids),
    }


def model_card(context: Context) -> str:
    """A README.md with what the run knows about the model."""
    recipe = context.recipe
    rows = []
    for index, stage in enumerate(recipe.train.all_stages if recipe.train else ()):
        manifest = context.run.step(context.stage_name(index)).manifest()
        if manifest and manifest["before"] is not None:
            rows.append(
                f"| {stage.name} | {' + '.join(stage.train)} | {manifest['summary']['tokens']:,} "
                f"| {stage.lr:g} | {manifest['before']:.4f} | {manifest['after']:.4f} |"
            )
    base = recipe.base.checkpoint or "a small model pretrained from scratch by this recipe"
    lines = ["---", "language: [ko, en]", "---", "", f"# {recipe.name}", ""]
    lines += [f"Made with RedWhale from {base}.", ""]
    if rows:
        lines += [
            "| stage | trained | tokens | learning rate | validation loss before | after |",
            "| --- |" + " --- |" * 5,
        ]
        lines += [*rows, ""]
    evaluation = context.run.step("eval").manifest() if recipe.eval is not None else None
    if evaluation:
        lines += ["Evaluation:", "", "```json", json.dumps(evaluation["summary"], indent=2), "```", ""]
    return "\n".join(lines)

"""Step `export`: one folder that Hugging Face tools load, checked after writing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ...model import CheckpointReader, PackedDocuments, load_model, write_checkpoint
from ...tokenizer import Tokenizer, export_hf_tokenizer, load_model_proto
from ..chat_templates import ChatTemplate, template_source
from ..conversations import Message
from ..errors import CheckpointError, RecipeError, RunError
from ..model_card import adapter_card, model_card
from ..run_folder import StepResult, write_json
from .context import Context, Unit, check_rows, config_of

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PROBE_TEXT = "대한민국의 모든 국민은 법 앞에 평등하다. All people are equal before the law."
_PROBE_CHAT = (Message("user", "1 + 1은?\n"), Message("assistant", "2입니다."), Message("user", "고마워요!"))
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

    def check() -> None:
        context.check_init()
        if config.gguf is not None and not Path(config.gguf).is_file():
            raise RecipeError(
                f"export.gguf = {config.gguf!r} is no file: give the path of llama.cpp's convert_hf_to_gguf.py"
            )
        if config.adapter and not _ends_in_lora(context):
            raise RecipeError('export.adapter needs a last step that trains ["lora"] alone: the rest is in no adapter')

    described = config_of(config)
    return [Unit("export", "export", described, inputs, lambda folder: run_export(context, folder), check)]


def run_export(context: Context, folder: Path) -> StepResult:
    """Write weights, tokenizer, chat template, generation config and model card to `folder/model`.

    With `adapter`, the last step's adapters also go to `folder/adapter`; with `gguf`, `folder/model.gguf` is made.

    Raises:
        CheckpointError: if transformers computes other logits from the folder than we do, or other ids.
        RunError: if the converter to GGUF fails.
    """
    config = context.recipe.export
    assert config is not None
    target = folder / "model"
    check_rows(context.final_model, context.tokenizer())
    reader = CheckpointReader(context.final_model)
    dtype = _DTYPES.get(config.precision)
    write_checkpoint(target, reader.config, ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in reader))
    template = chat_template(context)
    _write_tokenizer(context, target, template, reader.config.max_position_embeddings)
    ends = [reader.config.eos_token_id] if template is None else template.stop_ids
    generation = {"bos_token_id": reader.config.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    write_json(target / "generation_config.json", generation)
    (target / "README.md").write_text(model_card(context), encoding="utf-8")
    verification = verify(target) if config.verify else None
    if verification is not None:
        _require_agreement(target, verification)
    checked = "not compared (transformers is not installed)"
    if verification is not None:
        checked = f"transformers agrees to {verification['relative_difference']:.0e}"
    elif not config.verify:
        checked = "not compared (verify = false)"
    more = ""
    if config.adapter:
        _export_adapter(context, folder / "adapter", template)
        more += ", adapter for peft"
    if config.gguf is not None:
        convert_to_gguf(Path(config.gguf), target, folder / "model.gguf", config.gguf_type)
        more += f", GGUF of {(folder / 'model.gguf').stat().st_size / 1e6:.1f} MB"
    size = sum(path.stat().st_size for path in target.iterdir())
    return StepResult(
        summary={"verification": verification, "bytes": size},
        outputs=sorted(
            str(path.relative_to(folder))
            for path in [*target.iterdir(), *folder.glob("adapter/*"), *folder.glob("model.gguf")]
        ),
        went_in=str(context.final_model),
        came_out=f"{size / 1e6:.1f} MB, {checked}{more}",
    )


def chat_template(context: Context) -> ChatTemplate | None:
    """The template that the run's fine-tuning taught, or None where it does not fine-tune."""
    if context.recipe.sft is None:
        return None
    tokenizer = context.tokenizer()
    return ChatTemplate(template_source(context.recipe.sft.template, tokenizer), tokenizer)


def _write_tokenizer(context: Context, folder: Path, template: ChatTemplate | None, max_length: int | None) -> None:
    export_hf_tokenizer(
        load_model_proto(context.tokenizer_folder / "tokenizer.model"),
        folder,
        chat_template=template.source if template is not None else None,
        model_max_length=max_length,
    )


@torch.inference_mode()
def verify(folder: Path) -> dict[str, Any] | None:
    """Compare an exported folder under transformers with ours, in fp32; None where transformers is not installed.

    One of the two models is in memory at a time.

    Returns:
        max_difference, relative_difference (over the largest logit), same_ids, whether both tokenizers agree, and
        same_chat, whether they do on a conversation; None where the folder has no chat template.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        return None
    tokenizer = Tokenizer(folder / "tokenizer.model")
    ids = [tokenizer.bos_id, *tokenizer.encode(_PROBE_TEXT)]
    theirs_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    expected = theirs(torch.tensor([ids])).logits[0].clone()
    del theirs
    model = load_model(folder, dtype=torch.float32)
    actual = model(torch.tensor(ids), PackedDocuments.from_lengths([len(ids)]))
    difference = float((actual - expected).abs().max())
    same_chat = None
    if theirs_tokenizer.chat_template is not None:
        turns = [{"role": message.role, "content": message.content} for message in _PROBE_CHAT]
        rendered = theirs_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        same_chat = rendered == ChatTemplate(theirs_tokenizer.chat_template, tokenizer).prompt_ids(_PROBE_CHAT)
    return {
        "max_difference": difference,
        "relative_difference": difference / float(expected.abs().max()),
        "same_ids": theirs_tokenizer(_PROBE_TEXT)["input_ids"] == ids,
        "same_chat": same_chat,
        "tokens": len(ids),
    }


def _require_agreement(folder: Path, verification: dict[str, Any]) -> None:
    if not verification["relative_difference"] <= TOLERANCE:  # so that not-a-number counts as a difference
        raise CheckpointError(
            f"transformers computes other logits from {folder} than redwhale does "
            f"(difference {verification['relative_difference']:.1e} of the largest logit): please report this"
        )
    if not verification["same_ids"] or verification["same_chat"] is False:
        what = "a conversation" if verification["same_ids"] else "a text"
        raise CheckpointError(
            f"transformers gives {what} other token ids than redwhale does, from {folder}: please report this, "
            "with the tokenizer and the chat template"
        )


def _last_step(context: Context) -> tuple[str, Path, tuple[str, ...]] | None:
    """Name of the step that made the final model, the model that it began with, and what it trained."""
    recipe = context.recipe
    if recipe.sft is not None:
        return "sft", context.trained_model, recipe.sft.train
    if recipe.train is not None:
        last = len(recipe.train.all_stages) - 1
        before = context.initial_model if last == 0 else context.run.path / context.stage_name(last - 1) / "model"
        return context.stage_name(last), before, recipe.train.all_stages[last].train
    return None


def _ends_in_lora(context: Context) -> bool:
    last = _last_step(context)
    return last is not None and set(last[2]) == {"lora"}


def _export_adapter(context: Context, folder: Path, template: ChatTemplate | None) -> None:
    last = _last_step(context)
    assert last is not None
    step, base, _ = last
    source = context.run.path / step / "adapter"
    if not source.is_dir():
        raise RunError(f"{source} does not exist, so there is no adapter to export; redo {step.partition('/')[0]!r}")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    _write_tokenizer(context, folder, template, None)
    (folder / "README.md").write_text(adapter_card(context, base), encoding="utf-8")


def convert_to_gguf(script: Path, folder: Path, target: Path, kind: str) -> None:
    """Have llama.cpp's `convert_hf_to_gguf.py` make one file of an exported folder.

    It runs in this Python; what it needs beside (the package `gguf`, transformers) has to be installed.

    Raises:
        RunError: with its last line, if it fails.
    """
    staging = target.with_name(f"{target.name}.writing")
    command = [sys.executable, str(script), str(folder), "--outfile", str(staging), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not staging.exists():
        lines = (done.stderr.strip() or done.stdout.strip() or "it wrote nothing").splitlines()
        raise RunError(f"{script} could not make a GGUF of {folder}: {lines[-1]}; {folder} itself is complete")
    staging.rename(target)

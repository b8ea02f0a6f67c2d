"""KoBEST item by item: this engine against lm-evaluation-harness with transformers, on the same weights and files.

Two models answer all five tasks, zero-shot and few-shot, in fp32 on the CPU: the checkpoint on the command line,
written to a Hugging Face folder as `redwhale export` does, and a random one whose context holds all few-shot examples.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sentencepiece
import torch
from common import parser, write_result

from redwhale.engine.choice_scoring import log_likelihoods
from redwhale.engine.few_shot import with_examples
from redwhale.engine.kobest import KOBEST_TASKS, read_task, score
from redwhale.model import Llama, ModelConfig, load_model, save_model
from redwhale.tokenizer import Tokenizer, export_hf_tokenizer, load_model_proto


def main() -> None:
    """Compare and write the result."""
    import lm_eval

    options = _options()
    logging.disable(logging.WARNING)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folders = {"real": Path(name) / "real", "random": Path(name) / "random"}
        export(options.checkpoint, folders["real"])
        random_checkpoint(options.kobest, folders["random"])
        for model_name in options.models:
            for shots in options.shots:
                for task in KOBEST_TASKS:
                    found = compare(folders[model_name], options.kobest, task, shots, options.limit, options.batch_size)
                    results.setdefault(model_name, {}).setdefault(f"{shots}-shot", {})[task] = found
                    print(model_name, shots, task, found, flush=True)
    every = [found for shots in results.values() for tasks in shots.values() for found in tasks.values()]
    summary = {
        "items": sum(found["items"] for found in every),
        "different_choices": sum(found["different_choices"] for found in every),
        "largest_difference_nats": max(found["largest_difference_nats"] for found in every),
        "largest_metric_difference": max(found["largest_metric_difference"] for found in every),
    }
    settings = {**{key: getattr(options, key) for key in ("limit", "batch_size")}, "threads": torch.get_num_threads()}
    settings["lm_eval"] = lm_eval.__version__
    data = [options.checkpoint, options.kobest]
    write_result(options.result, __file__, {**settings, "summary": summary, "results": results}, data=data)


def _options() -> argparse.Namespace:
    made = parser(__doc__, "kobest_parity")
    made.add_argument("checkpoint", type=Path, help="Hugging Face folder with tokenizer.model")
    made.add_argument("kobest", type=Path, help="folder with TASK/{train,dev,test}.tsv or .jsonl")
    made.add_argument("--shots", type=int, nargs="+", default=[0, 5])
    made.add_argument("--models", nargs="+", choices=("real", "random"), default=["real", "random"])
    made.add_argument("--limit", type=int, help="first items of each task alone")
    made.add_argument("--batch-size", type=int, default=1, help="requests in a batch of the harness")
    return made.parse_args()


def export(checkpoint: Path, folder: Path) -> None:
    """The checkpoint in fp32 with its tokenizer in Hugging Face's form."""
    export_hf_tokenizer(load_model_proto(checkpoint / "tokenizer.model"), folder.with_suffix(".tokenizer"))
    files = sorted(folder.with_suffix(".tokenizer").iterdir())
    save_model(load_model(checkpoint, dtype=torch.float32), folder, extra_files=files)


def random_checkpoint(kobest: Path, folder: Path) -> None:
    """A small random model with a Korean tokenizer and 2,048 tokens of context."""
    text = (kobest / "BoolQ" / "train.tsv").read_text(encoding="utf-8").splitlines()
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=written,
        model_type="bpe",
        vocab_size=6000,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    source = folder.with_suffix(".source")
    source.mkdir()
    (source / "tokenizer.model").write_bytes(written.getvalue())
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = ModelConfig(vocab_size=6000, hidden_size=64, intermediate_size=128, max_position_embeddings=2048, **shape)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)  # logits that differ by more than rounding
    save_model(model, source, extra_files=[source / "tokenizer.model"])
    export(source, folder)


def compare(folder: Path, kobest: Path, task: str, shots: int, limit: int | None, batch_size: int) -> dict[str, Any]:
    """Both evaluations of one task, and how far they are apart."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from redwhale.engine.lm_eval_adapter import kobest_task

    began = time.perf_counter()
    harness = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size, add_bos_token=True)
    evaluated = lm_eval.simple_evaluate(
        model=harness, tasks=[kobest_task(kobest, task)], num_fewshot=shots, limit=limit, bootstrap_iters=0
    )
    seconds_theirs = time.perf_counter() - began
    name = f"kobest_{task}"
    samples = sorted(evaluated["samples"][name], key=lambda sample: sample["doc_id"])
    theirs = [[float(value[0]) for value in sample["filtered_resps"]] for sample in samples]

    began = time.perf_counter()
    tokenizer = Tokenizer(folder / "tokenizer.model")
    items = read_task(kobest, task)[:limit]
    asked = with_examples(items, read_task(kobest, task, "train"), shots)
    ours = log_likelihoods(load_model(folder), tokenizer, asked)
    seconds_ours = time.perf_counter() - began

    assert [len(values) for values in ours] == [len(values) for values in theirs]
    apart = [abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    metrics = score(items, ours, task=task)
    reported = {key.partition(",")[0]: value for key, value in evaluated["results"][name].items()}
    pairs = [(metrics.acc, reported["acc"]), (metrics.macro_f1, reported["f1"])]
    if metrics.acc_norm is not None:
        pairs.append((metrics.acc_norm, reported["acc_norm"]))
    return {
        "items": len(items),
        "different_choices": sum(_best(x) != _best(y) for x, y in zip(ours, theirs, strict=True)),
        "largest_difference_nats": max(apart),
        "largest_metric_difference": max(abs(a - b) for a, b in pairs),
        "acc": metrics.acc,
        "macro_f1": metrics.macro_f1,
        "seconds_lm_eval": round(seconds_theirs, 1),
        "seconds_redwhale": round(seconds_ours, 1),
    }


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


if __name__ == "__main__":
    main()

"""Loss curves of stages whose frozen layers are in FP8 beside those in bf16, on a real pretrained checkpoint.

The checkpoint's embedding is copied as its LM head where the two are tied. Embedding and head train first, then
adapters behind the bf16 run's result; each stage runs twice, from the same weights on the same batches in the same
order. On a CPU the products multiply the codes' values in fp32: what the tensor cores add up in fewer bits is not in
it.

Then one batch's activations and gradients are quantised layer by layer: the error of x·Wᵀ and of dY·W against fp32,
with gradients in e4m3, as they are, and in e5m2.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from common import parser, write_result
from torch import Tensor, nn

from redwhale.engine import LoopConfig, Stage, Trainer
from redwhale.engine.batches import IGNORE_INDEX, TokenSequence, batched
from redwhale.engine.evaluation import evaluate_loss
from redwhale.engine.loop_config import Frozen
from redwhale.engine.stages import LoRAConfig
from redwhale.filtering import find_inputs, read_documents
from redwhale.kernels import quantise_rows
from redwhale.model import Llama, load_model
from redwhale.model.lora import linear_layers

WINDOW = 20
"""Steps whose losses are averaged for the comparison."""
_PIECE = 2560
"""Characters of a document that are tokenised at a time."""


class Sequences:
    """Tokens of documents, cut into sequences of one length; what is left of a document is dropped."""

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def sequence(self, index: int) -> TokenSequence:
        """One row as a document of its own."""
        ids = np.array(self._rows[index], dtype=np.int64)
        return TokenSequence(ids, np.append(ids[1:], IGNORE_INDEX), [len(ids)])


def rows_of(paths: list[Path], tokenizer: Path, length: int, count: int) -> list[list[int]]:
    """The first `count` rows of `length` tokens, as many from every file."""
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))

    def rows(path: Path) -> Iterator[list[int]]:
        for document in read_documents(path):
            for start in range(0, len(document.text), _PIECE):
                ids = [encoder.bos_id(), *encoder.encode(document.text[start : start + _PIECE])]
                yield from (ids[begin : begin + length] for begin in range(0, len(ids) - length + 1, length))

    sources = [rows(path) for path in paths]
    found: list[list[int]] = []
    while len(found) < count and sources:
        for source in list(sources):
            row = next(source, None)
            if row is None:
                sources.remove(source)
            else:
                found.append(row)
    return found[:count]


def untied(folder: Path) -> Llama:
    """The checkpoint in bf16 with a head of its own."""
    model = load_model(folder, dtype=torch.bfloat16)
    made = Llama(dataclasses.replace(model.config, tie_word_embeddings=False)).to(torch.bfloat16)
    state = model.state_dict()
    made.load_state_dict({"lm_head.weight": state["model.embed_tokens.weight"], **state})
    return made


def run(state: dict[str, Tensor], like: Llama, stage: Stage, data: Sequences, frozen: Frozen, batch: int) -> Any:
    """Losses of all steps, the seconds they took, and the model they end with."""
    model = Llama(like.config).to(torch.bfloat16)
    model.load_state_dict(state)
    losses: list[float] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        loop = LoopConfig(batch_size=batch, micro_batch_size=batch, frozen=frozen, log_every=1, checkpoint_every=10**6)
        length = len(data.sequence(0).input_ids)
        trainer = Trainer(model, stage, data, sequence_length=length, folder=Path(folder), loop=loop)
        trainer.on_log = lambda line: losses.append(line["loss"])
        trainer.run()
    return losses, time.monotonic() - began, model


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def e5m2_rows(values: Tensor) -> Tensor:
    scales = values.abs().amax(1, keepdim=True).clamp_min(1e-30) / 57344
    return (values / scales).to(torch.float8_e5m2).float() * scales


def layer_errors(model: Llama, data: Sequences) -> dict[str, dict[str, float]]:
    """Mean relative errors by kind of layer, on one batch."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = [given[0].detach()]
            # A copy: RoPE turns what it is given in place, and autograd's graph of the product ends there.
            output.register_hook(seen[name].append)

        return hook

    layers = linear_layers(model)
    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    model.model.embed_tokens.requires_grad_()
    batch = next(batched(data, list(range(4)), 4))
    model.loss(batch.input_ids, batch.targets, batch.documents).loss_sum.backward()
    for hook in hooks:
        hook.remove()
    errors: dict[str, dict[str, list[float]]] = {}
    for name, layer in layers.items():
        x, grad = (tensor.float() for tensor in seen[name])
        W = layer.weight.detach().float()
        coded = quantise_rows([W])
        of_kind = errors.setdefault(name.rpartition(".")[2], {"y": [], "dx_e4m3": [], "dx_e5m2": []})
        scaled, codes = grad * coded.scales.T, coded.codes.float()
        of_kind["y"].append(relative(quantise_rows([x]).dequantised() @ coded.dequantised().T, x @ W.T))
        of_kind["dx_e4m3"].append(relative(quantise_rows([scaled]).dequantised() @ codes, grad @ W))
        of_kind["dx_e5m2"].append(relative(e5m2_rows(scaled) @ codes, grad @ W))
    return {kind: {way: round(statistics.mean(v), 5) for way, v in ways.items()} for kind, ways in errors.items()}


def windows(losses: list[float]) -> list[float]:
    return [statistics.mean(losses[begin : begin + WINDOW]) for begin in range(0, len(losses), WINDOW)]


def compared(stored: list[float], fp8: list[float]) -> dict[str, Any]:
    """Both curves, and how far they are apart."""
    pairs = list(zip(windows(stored), windows(fp8), strict=True))
    differences = [round(b / a - 1, 6) for a, b in pairs]
    return {
        "window": WINDOW,
        "stored": [round(a, 5) for a, _ in pairs],
        "fp8": [round(b, 5) for _, b in pairs],
        "difference": differences,
        "mean_difference": round(sum(fp8) / sum(stored) - 1, 6),
        "largest_difference": max(map(abs, differences)),
        "largest_difference_behind_the_first_window": max(map(abs, differences[1:]), default=None),
        "largest_difference_of_a_step": round(max(abs(b / a - 1) for a, b in zip(stored, fp8, strict=True)), 6),
    }


def heldout_losses(models: dict[str, nn.Module], data: Sequences) -> dict[str, float]:
    """Nats a token with the weights that a stage hands on."""
    return {name: round(evaluate_loss(model.eval(), data, batch_size=4).loss, 5) for name, model in models.items()}


def main(given: argparse.Namespace) -> None:
    """Train, compare and write the result."""
    torch.set_num_threads(given.threads)
    texts: dict[str, list[Path]] = {}
    for text in given.text:
        name, _, path = text.partition("=")
        texts.setdefault(name, []).append(Path(path))
    results = {name: of_text(given, find_inputs(paths)) for name, paths in texts.items()}
    settings = {"steps": given.steps, "tokens_a_step": given.batch * given.length, "lr": given.lr}
    paths = [given.checkpoint, *(path for of_name in texts.values() for path in of_name)]
    write_result(given.result, __file__, {"settings": settings, "texts": results}, data=paths)


def of_text(given: argparse.Namespace, paths: list[Path]) -> dict[str, Any]:
    """Both stages on one language."""
    rows = rows_of(paths, given.checkpoint / "tokenizer.model", given.length, given.steps * given.batch + 16)
    heldout, data = Sequences(rows[:16]), Sequences(rows[16:])
    base = untied(given.checkpoint)
    tokens = given.steps * given.batch * given.length
    stages = [
        Stage(name="embed+head", train=("embed", "head"), tokens=tokens, lr=given.lr),
        Stage(name="lora", train=("lora",), tokens=tokens, lr=given.lr, lora=LoRAConfig(r=16, alpha=16.0)),
    ]
    state, results, model = base.state_dict(), {}, base
    for stage in stages:
        curves, models, seconds = {}, {}, {}
        for frozen in ("stored", "fp8"):
            curves[frozen], seconds[frozen], models[frozen] = run(state, base, stage, data, frozen, given.batch)
        found = compared(curves["stored"], curves["fp8"])
        results[stage.name] = {
            **found,
            "heldout": heldout_losses(models, heldout),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        }
        shown = {name: round(curve[-1], 4) for name, curve in curves.items()}
        print(stage.name, shown, f"largest difference {found['largest_difference']:.3%}", flush=True)
        model = models["stored"]
        state = model.state_dict()
    return {"stages": results, "relative_errors": layer_errors(model, data)}


if __name__ == "__main__":
    arguments = parser(__doc__, "fp8_base")
    arguments.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face folder with tokenizer.model")
    arguments.add_argument("--text", nargs="+", required=True, metavar="NAME=FILE", help="to train on, by language")
    arguments.add_argument("--steps", type=int, default=150, help="of each stage (default: %(default)s)")
    arguments.add_argument("--batch", type=int, default=4, help="sequences a step (default: %(default)s)")
    arguments.add_argument("--length", type=int, default=128, help="tokens a sequence (default: %(default)s)")
    arguments.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default: %(default)s)")
    arguments.add_argument("--threads", type=int, default=1)
    main(arguments.parse_args())

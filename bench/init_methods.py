"""Initialisation methods on a real base: held-out text before training and after the same short training.

Extends --checkpoint with the new pieces of --tokenizer, a folder that `build_hybrid_tokenizer` wrote. Every choice is
measured on Korean and English held-out text, then the embedding and head that it gave are trained for --steps steps and
measured again, from each of --seeds, which set the random rows and the data order. A tied base is measured
untied, with the embedding copied as head, since only then do the two matrices have methods of their own; --tied names
the choices that are also measured, without training, on the base as it is.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from common import parser, write_result

from redwhale.engine import LoopConfig, PackedSequences, Stage, TokenShards, Trainer, write_shard
from redwhale.engine.init_choice import Choice, FitTexts, choose_rows
from redwhale.engine.init_evaluation import evaluate_vocabulary
from redwhale.engine.init_vocabulary import HybridVocabulary
from redwhale.engine.steps.context import first_texts
from redwhale.filtering import find_inputs
from redwhale.model import Llama, NewVocabulary, load_model, save_model, write_extended
from redwhale.model.init_similarity import cooccurrence_vectors
from redwhale.tokenizer import Tokenizer

CHOICES = (
    *("decomposition", "random", "exponential", "focus", "mean", "multivariate", "first", "decomposition/first"),
    *("mean/mean+prior", "omp", "position-weighted", "length-weighted", "decomposition+prior", "distillation"),
)
TIED = ("decomposition", "random", "exponential", "focus")


@dataclass(frozen=True)
class Setting:
    """What all choices share."""

    given: argparse.Namespace
    tokenizer: Tokenizer
    first_new_row: int
    vocabulary: NewVocabulary
    texts: FitTexts
    heldout: dict[str, list[str]]
    data: PackedSequences

    def measured(self, model: Llama, tokenizer: Tokenizer) -> dict[str, Any]:
        """Results by language."""
        return {
            language: msgspec.to_builtins(
                evaluate_vocabulary(model, tokenizer, texts, self.first_new_row, batch_size=4)
            )
            for language, texts in self.heldout.items()
        }

    def runs(self, checkpoint: Path, choice: Choice, work: Path, *, train: bool) -> list[dict[str, Any]]:
        """One choice from every seed: before and, where it trains, after; a choice that draws nothing is made once."""
        given, found = self.given, []
        draws = bool({choice.embedding, choice.head} & {"random", "multivariate", "distillation"})
        for number, seed in enumerate(given.seeds):
            if number == 0 or draws:
                base = load_model(checkpoint, dtype=torch.float32) if choice.needs_model else None
                made = choose_rows(
                    checkpoint, self.vocabulary, choice, model=base, texts=self.texts, seed=seed,
                    fit_steps=given.fit_steps,
                )  # fmt: skip
                write_extended(checkpoint, work / "extended", {name: new.rows for name, new in made.items()})
                before = self.measured(load_model(work / "extended", dtype=torch.float32), self.tokenizer)
                collisions = {name: new.collisions for name, new in made.items()}
                gc.collect()
            found.append({"seed": seed, "collisions": collisions, "before": before})
            if train:
                found[-1]["after"] = self.trained(load_model(work / "extended", dtype=torch.float32), seed)
                gc.collect()
        return found

    def trained(self, model: Llama, seed: int) -> dict[str, Any]:
        """Results after the short training of embedding and head."""
        given = self.given
        tokens = given.steps * given.batch_size * given.sequence_length
        stage = Stage(name="embed-head", train=("embed", "head"), tokens=tokens, lr=given.lr)
        loop = LoopConfig(batch_size=given.batch_size, micro_batch_size=given.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            Trainer(
                model, stage, self.data, sequence_length=given.sequence_length, folder=Path(folder), seed=seed,
                loop=loop,
            ).run()  # fmt: skip
        return self.measured(model.eval(), self.tokenizer)


def prepare(given: argparse.Namespace, work: Path) -> Setting:
    """Encode, pack and decompose once for all choices."""
    pair = HybridVocabulary.open(given.checkpoint / "tokenizer.model", given.tokenizer / "tokenizer.model")
    tokenizer = Tokenizer(pair.hybrid.path)
    texts = [text for path in given.korean for text in first_texts([path], given.documents)]
    ids = [torch.tensor(one) for one in tokenizer.encode_batch(texts)]
    documents = (
        ([tokenizer.bos_id, *one.tolist(), tokenizer.eos_id], len(text.encode()))
        for text, one in zip(texts, ids, strict=True)
    )
    (work / "shards").mkdir()
    write_shard(
        work / "shards" / "train-00000", documents, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    )
    english = "".join(first_texts(find_inputs([given.english]), 3))
    pages = [english[n : n + 500] for n in range(0, 500 * given.fitted, 500)]
    cut = given.sequence_length
    fitted = FitTexts(
        [one[:cut] for one in ids[:: max(1, len(ids) // given.fitted)] if len(one) > 1],
        [torch.tensor(one[:cut]) for one in tokenizer.encode_batch(pages) if one],
    )
    vectors = cooccurrence_vectors(ids, tokenizer.vocab_size)
    vocabulary = NewVocabulary(pair.decompositions, pair.base.surfaces, vectors)
    most = given.heldout_characters
    korean = [text[:most] for path in given.korean_heldout for text in first_texts([path], given.heldout_documents)]
    heldout = {"korean": korean, "english": [next(first_texts([given.english_heldout]))[: 4 * most]]}
    data = PackedSequences(TokenShards.open(work / "shards", "train"), sequence_length=given.sequence_length)
    return Setting(given, tokenizer, pair.first_new_row, vocabulary, fitted, heldout, data)


def untied_copy(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint in fp32, with its embedding copied as head where it has none of its own."""
    model = load_model(checkpoint, dtype=torch.float32)
    if model.config.tie_word_embeddings:
        model.config = model.model.config = replace(model.config, tie_word_embeddings=False)
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
    save_model(model, folder)
    return folder


def summary(runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds, and bits per byte below `plain`'s from the same seeds."""
    found: dict[str, Any] = {}
    for when in [key for key in ("before", "after") if key in runs[0]]:
        for language in runs[0][when]:
            for key in ("bits_per_byte", "loss", "accuracy", "new_mass_bits_per_byte"):
                found[f"{when}_{language}_{key}"] = spread([run[when][language][key] for run in runs])
        below = [a[when]["korean"]["bits_per_byte"] - b[when]["korean"]["bits_per_byte"] for a, b in zip(plain, runs)]  # noqa: B905
        if below and when in plain[0]:
            found[f"{when}_korean_below_decomposition"] = spread(below)
    return found


def spread(values: list[float]) -> list[float | None]:
    """Mean and sample standard deviation."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]


def cases(given: argparse.Namespace, untied: Path, tied: bool) -> Iterator[tuple[str, Path, str]]:
    """Label of the base, its folder, and the choice."""
    for name in given.choices:
        yield "untied", untied, name
    for name in given.tied if tied else ():
        yield "tied", given.checkpoint, name


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "init_methods")
    arguments.add_argument("--checkpoint", type=Path, required=True, help="base, with its tokenizer.model")
    arguments.add_argument("--tokenizer", type=Path, required=True, help="folder of the hybrid tokenizer")
    arguments.add_argument("--korean", type=Path, nargs="+", required=True, help="text to train on and fit to")
    arguments.add_argument("--korean-heldout", type=Path, nargs="+", required=True)
    arguments.add_argument("--english", type=Path, required=True, help="text of the base's language, for the prior")
    arguments.add_argument("--english-heldout", type=Path, required=True)
    arguments.add_argument("--documents", type=int, default=400, help="of each Korean file (default: %(default)s)")
    arguments.add_argument("--fitted", type=int, default=100, help="documents that distillation and priors look at")
    arguments.add_argument("--fit-steps", type=int, default=50, help="of distillation (default: %(default)s)")
    arguments.add_argument("--heldout-documents", type=int, default=2, help="of each file (default: %(default)s)")
    arguments.add_argument(
        "--heldout-characters", type=int, default=800, help="of a document; four times as many of English, in all"
    )
    arguments.add_argument("--choices", nargs="*", default=list(CHOICES))
    arguments.add_argument("--tied", nargs="*", default=list(TIED))
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--steps", type=int, default=12, help="of training (default: %(default)s)")
    arguments.add_argument("--batch-size", type=int, default=2, help="sequences (default: %(default)s)")
    arguments.add_argument("--sequence-length", type=int, default=256, help="tokens (default: %(default)s)")
    arguments.add_argument("--lr", type=float, default=2e-3)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        setting = prepare(given, work)
        untied = untied_copy(given.checkpoint, work / "untied")
        model = load_model(given.checkpoint, dtype=torch.float32)
        found: dict[str, Any] = {
            "new_pieces": len(setting.vocabulary.decompositions),
            "byte_only_pieces": sum(setting.vocabulary.byte_only()),
            "training_tokens": given.steps * given.batch_size * given.sequence_length,
            "base": setting.measured(model, Tokenizer(given.checkpoint / "tokenizer.model")),
            "choices": [],
        }
        tied = model.config.tie_word_embeddings
        del model
        plain: dict[str, list[dict[str, Any]]] = {}
        inputs = [given.checkpoint, given.tokenizer, *given.korean, *given.korean_heldout]
        for base, checkpoint, name in cases(given, untied, tied):
            runs = setting.runs(checkpoint, Choice.parse(name), work, train=base == "untied")
            if name == "decomposition":
                plain[base] = runs
            measured = {"base": base, "choice": name, **summary(runs, plain.get(base, []))}
            found["choices"].append({**measured, "runs": runs})
            print(json.dumps(measured), flush=True)
            # After every choice: the runs are long, and what is measured should survive their end.
            write_result(given.result, __file__, found, data=[*inputs, given.english, given.english_heldout])


if __name__ == "__main__":
    main()

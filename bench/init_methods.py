"""Initialisation methods on a real base: held-out text before training and after the same short training.

Extends --checkpoint with the new pieces of --tokenizer, a folder that `build_hybrid_tokenizer` wrote. Every choice is
measured on Korean and English held-out text at step 0; those in --train are then trained, embedding and head alone,
for --steps steps from each of --seeds, which set the random rows, the noise and the data order. A tied base is measured
untied, with the embedding copied as head, since only then do the two matrices have methods of their own; --tied names
the choices that are also measured on the base as it is.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from common import parser, write_result

from redwhale.engine import LoopConfig, PackedSequences, Stage, TokenShards, Trainer
from redwhale.engine.init_choice import Choice, FitTexts, choose_rows
from redwhale.engine.init_evaluation import evaluate_vocabulary
from redwhale.engine.steps.context import first_texts
from redwhale.filtering import find_inputs
from redwhale.model import NewVocabulary, RowFinish, load_model, save_model, write_extended
from redwhale.model.init_similarity import cooccurrence_vectors
from redwhale.tokenizer import Tokenizer, decompose_pieces, load_model_proto, piece_surfaces

UNTIED = (
    *("random", "mean", "multivariate", "decomposition", "decomposition/first", "first"),
    *("length-weighted", "position-weighted", "exponential", "focus", "omp", "distillation"),
    *("mean/mean+prior", "random/random+prior", "decomposition+prior", "decomposition/mean+prior"),
    *("decomposition/first+prior", "focus/focus+prior", "distillation/decomposition+prior", "distillation/mean+prior"),
)
TIED = UNTIED[: UNTIED.index("mean/mean+prior")]
TRAINED = ("random", "mean", "multivariate", "decomposition", "decomposition/first", "decomposition+prior")


def untied_copy(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with its embedding copied as head."""
    model = load_model(checkpoint, dtype=torch.float32)
    model.config = model.model.config = replace(model.config, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
    save_model(model, folder)
    return folder


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "init_methods")
    arguments.add_argument("--checkpoint", type=Path, required=True, help="base, with its tokenizer.model")
    arguments.add_argument("--tokenizer", type=Path, required=True, help="folder of the hybrid tokenizer")
    arguments.add_argument("--korean", type=Path, nargs="+", required=True, help="text to train on and fit to")
    arguments.add_argument("--korean-heldout", type=Path, nargs="+", required=True)
    arguments.add_argument("--english", type=Path, required=True, help="text of the base's language, for the prior")
    arguments.add_argument("--english-heldout", type=Path, required=True)
    arguments.add_argument("--heldout-documents", type=int, default=15, help="of each file (default: %(default)s)")
    arguments.add_argument("--fit-documents", type=int, default=400, help="of each file (default: %(default)s)")
    arguments.add_argument("--fitted", type=int, default=200, help="documents that distillation and priors look at")
    arguments.add_argument("--choices", nargs="*", default=list(UNTIED))
    arguments.add_argument("--tied", nargs="*", default=list(TIED), help="choices for the tied base, if it is tied")
    arguments.add_argument("--train", nargs="*", default=list(TRAINED), help="choices to train, untied")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--steps", type=int, default=40, help="of training (default: %(default)s)")
    arguments.add_argument("--batch-size", type=int, default=4, help="sequences (default: %(default)s)")
    arguments.add_argument("--sequence-length", type=int, default=256, help="tokens (default: %(default)s)")
    arguments.add_argument(
        "--heldout-characters", type=int, default=2000, help="of a document; five times as many of English, in all"
    )
    arguments.add_argument("--lr", type=float, default=2e-3)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    tokens = given.steps * given.batch_size * given.sequence_length

    base_tokenizer = given.checkpoint / "tokenizer.model"
    proto, hybrid = load_model_proto(base_tokenizer), Tokenizer(given.tokenizer / "tokenizer.model")
    first = len(proto.pieces)
    pieces = [hybrid.id_to_piece(i) for i in range(first, hybrid.vocab_size)]
    texts = [text for path in given.korean for text in first_texts([path], given.fit_documents)]
    english = "".join(first_texts(find_inputs([given.english]), 3))[: 1 << 17]
    ids = [torch.tensor(i) for i in hybrid.encode_batch(texts)]
    english_ids = hybrid.encode_batch([english[n : n + 500] for n in range(0, 500 * given.fitted, 500)])
    cut = given.sequence_length
    fit = FitTexts(
        [i[:cut] for i in ids[:: max(1, len(ids) // given.fitted)] if len(i) > 1],
        [torch.tensor(i[:cut]) for i in english_ids if i],
    )
    vocabulary = NewVocabulary(
        decompose_pieces(proto, pieces), piece_surfaces(proto), cooccurrence_vectors(ids, hybrid.vocab_size)
    )
    english_heldout = next(first_texts([given.english_heldout]))[: 5 * given.heldout_characters]
    korean_heldout = [text for path in given.korean_heldout for text in first_texts([path], given.heldout_documents)]
    heldout = {"korean": [t[: given.heldout_characters] for t in korean_heldout], "english": [english_heldout]}

    def measured(model: Any) -> dict[str, Any]:
        return {
            domain: msgspec.to_builtins(evaluate_vocabulary(model, hybrid, texts_, first, batch_size=4))
            for domain, texts_ in heldout.items()
        }

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        _pack(work, texts, hybrid)
        data = PackedSequences(TokenShards.open(work / "shards", "train"), sequence_length=given.sequence_length)
        untied = untied_copy(given.checkpoint, work / "untied")
        base_model = load_model(given.checkpoint, dtype=torch.float32)
        plain = Tokenizer(base_tokenizer)
        base = {
            domain: msgspec.to_builtins(evaluate_vocabulary(base_model, plain, texts_, first, batch_size=4))
            for domain, texts_ in heldout.items()
        }
        tied = base_model.config.tie_word_embeddings
        del base_model
        cases = [(untied, "untied", name) for name in given.choices] + [
            (given.checkpoint, "tied", name) for name in given.tied if tied
        ]
        for checkpoint, kind, name in cases:
            choice = Choice.parse(name)
            trained = kind == "untied" and name in given.train
            runs = []
            random = bool({choice.embedding, choice.head} & {"random", "multivariate"})
            for seed in given.seeds if trained or random else given.seeds[:1]:
                began = time.perf_counter()
                model = load_model(checkpoint, dtype=torch.float32) if choice.needs_model else None
                made = choose_rows(
                    checkpoint, vocabulary, choice, model=model, texts=fit, finish=RowFinish(break_collisions=0.02),
                    seed=seed,
                )  # fmt: skip
                seconds = time.perf_counter() - began
                write_extended(checkpoint, work / "extended", {key: new.rows for key, new in made.items()})
                model = load_model(work / "extended", dtype=torch.float32)
                run = {"seed": seed, "seconds": seconds, "before": measured(model)}
                run["collisions"] = {key: new.collisions for key, new in made.items()}
                if trained:
                    stage = Stage(name="embed-head", train=("embed", "head"), tokens=tokens, lr=given.lr)
                    with tempfile.TemporaryDirectory() as folder:
                        Trainer(
                            model, stage, data, sequence_length=given.sequence_length, folder=Path(folder), seed=seed,
                            loop=LoopConfig(batch_size=given.batch_size, micro_batch_size=given.batch_size),
                        ).run()  # fmt: skip
                    run["after"] = measured(model.eval())
                runs.append(run)
                del model
                gc.collect()
            line = {"base": kind, "choice": name, "trained": trained, "runs": runs, **_summary(runs)}
            rows.append(line)
            print(json.dumps({"base": kind, "choice": name, **_summary(runs)}), flush=True)
            found = {
                "new_pieces": len(pieces),
                "byte_only_pieces": sum(vocabulary.byte_only()),
                "training_tokens": tokens,
                "base": base,
                "choices": rows,
            }
            inputs = [given.checkpoint, given.tokenizer, *given.korean, *given.korean_heldout]
            # After every choice: the runs are long, and what is measured should survive their end.
            write_result(given.result, __file__, found, data=[*inputs, given.english, given.english_heldout])


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds."""
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        for domain in ("korean", "english"):
            for key in ("bits_per_byte", "loss", "accuracy"):
                values = [run[when][domain][key] for run in runs if when in run]
                if values:
                    spread = statistics.stdev(values) if len(values) > 1 else None
                    found[f"{when}_{domain}_{key}"] = [statistics.mean(values), spread]
    return found


def _pack(work: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    from redwhale.engine import write_shard

    (work / "shards").mkdir()
    documents = (
        ([tokenizer.bos_id, *ids, tokenizer.eos_id], len(text.encode()))
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
    )
    write_shard(
        work / "shards" / "train-00000", documents, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    )


if __name__ == "__main__":
    main()

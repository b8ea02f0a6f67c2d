"""Token ratio of hybrid tokenizers on KoBEST and held-out text, the proofs they pass, and two simpler recipes.

For each base (a SentencePiece `.model`, a byte-level `tokenizer.json`, or a GGUF file that holds one) a hybrid is built
and checked. Beside a SentencePiece hybrid stand the plain recipe (as many pieces in training order, single syllables
first, of a BPE trained on the corpus as it is) and the chosen pieces appended with score 0, a common shortcut.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from common import parser, write_result

from redwhale.engine.kobest_texts import kobest_texts
from redwhale.filtering import read_documents
from redwhale.tokenizer import (
    ModelProto,
    TokenizerConfig,
    build_hybrid_tokenizer,
    check_tokenizer,
    compare,
    load_model_proto,
    merge_pieces,
    open_encoder,
    unreachable_pieces,
)
from redwhale.tokenizer.byte_level import is_byte_level
from redwhale.tokenizer.export import tokenizer_json
from redwhale.tokenizer.gguf_file import byte_level_json
from redwhale.tokenizer.hybrid import corpus_words, trained_candidates
from redwhale.tokenizer.proofs import count_parity
from redwhale.tokenizer.sweep import knee, sweep_sizes

PLAIN = TokenizerConfig(vocab_size=24_000)


def documents_of(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Source (the name of the file) and text of all documents, in order."""
    for file in files:
        for document in read_documents(file):
            yield file.name.split(".")[0], document.text


def ratios(base: Path, other: Path, domains: dict[str, list[str]]) -> dict[str, float]:
    """Token ratio by domain, and the mean of KoBEST's tasks."""
    compared = compare("", open_encoder(base), open_encoder(other), domains)
    found = {row.domain: round(row.ratio, 4) for row in compared.domains}
    kobest = [row.ratio for row in compared.domains if row.domain.startswith("kobest/")]
    return {**found, "kobest mean": round(sum(kobest) / len(kobest), 4)} if kobest else found


def simpler(base: Path, hybrid: Path, korean: list[Path], size: int, domains: dict[str, list[str]]) -> dict[str, Any]:
    """Ratios of the plain recipe; mismatches and unreachable pieces of the hybrid's pieces with score 0."""
    proto, merged = load_model_proto(base), load_model_proto(hybrid / "tokenizer.model")
    words, _ = corpus_words(documents_of(korean), PLAIN)
    candidates = trained_candidates(proto, words, PLAIN)
    first = sorted(range(len(candidates)), key=lambda i: (len(candidates[i]) > 1, i))[:size]
    lines = [line for texts in domains.values() for text in texts for line in text.splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / "plain.model"
        plain.write_bytes(merge_pieces(proto, [candidates[i] for i in sorted(first)]).SerializeToString())
        tied = ModelProto()
        tied.CopyFrom(merged)
        for piece in list(tied.pieces)[len(proto.pieces) :]:
            piece.score = 0.0
        (Path(name) / "tokenizer.model").write_bytes(tied.SerializeToString())
        # Not export_hf_tokenizer: it refuses tied scores, and here we want to see what they would do.
        (Path(name) / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer_json(tied)))
        parity = count_parity(open_encoder(Path(name) / "tokenizer.model"), Path(name) / "tokenizer.json", lines)
        return {
            "plain": {"vocab_size": PLAIN.vocab_size, "added": len(first), "ratios": ratios(base, plain, domains)},
            "score_zero": {
                "lines": parity[0] if parity else None,
                "mismatches": parity[1] if parity else None,
                "unreachable": len(unreachable_pieces(tied, range(len(tied.pieces)))),
            },
        }


def measure(
    base: Path, korean: list[Path], config: TokenizerConfig, domains: dict[str, list[str]], english: list[str]
) -> dict[str, Any]:
    """Build a hybrid, prove it, and measure it."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        began = time.perf_counter()
        summary = build_hybrid_tokenizer(
            documents_of(korean), base, output, config, domains=domains, english_sample=english
        )
        built = time.perf_counter()
        report = check_tokenizer(output, base=base, english=english)
        checked = time.perf_counter()
        beside = {} if is_byte_level(base) else simpler(base, output, korean, summary.added, domains)
        hybrid = output / ("tokenizer.json" if is_byte_level(base) else "tokenizer.model")
        return {
            "base_pieces": summary.base_pieces,
            "candidates": summary.candidates,
            "added": summary.added,
            "vocab_size": summary.vocab_size,
            "dropped_unreachable": len(summary.dropped_unreachable),
            "training_characters": summary.training_characters,
            "ratios": ratios(base, hybrid, domains),
            "domains": {row.domain: msgspec.to_builtins(row) for row in summary.domains},
            "english_lines": summary.english_lines,
            "english_lines_changed": len(summary.english_changes),
            "proofs": [msgspec.to_builtins(check) for check in report.checks],
            "build_seconds": round(built - began, 1),
            "proof_seconds": round(checked - built, 1),
            **beside,
        }


def named_path(text: str) -> tuple[str, Path]:
    """NAME=PATH as a pair."""
    name, separator, path = text.partition("=")
    if not separator or not name or not Path(path).is_file():
        raise ValueError(text)
    return name, Path(path)


def sizes(text: str) -> list[int]:
    """Numbers between commas."""
    return [int(number) for number in text.split(",")]


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "hybrid_tokenizers")
    arguments.add_argument("korean", nargs="+", type=Path, help="files of Korean text to train on, one source each")
    arguments.add_argument("--base", type=named_path, action="append", required=True, metavar="NAME=FILE")
    arguments.add_argument("--heldout", type=named_path, action="append", default=[], metavar="DOMAIN=FILE")
    arguments.add_argument("--kobest", type=Path, required=True, help="folder of KoBEST's TSV files")
    arguments.add_argument("--english", type=Path, required=True, help="text whose lines should keep their ids")
    arguments.add_argument("--vocab-size", type=int, default=40_000, help="pieces to train (default: %(default)s)")
    arguments.add_argument("--max-added", type=int, default=20_000, help="pieces to add (default: %(default)s)")
    arguments.add_argument("--balance", type=float, default=0.3, help="power of a source's size (default: %(default)s)")
    arguments.add_argument(
        "--sweep",
        type=sizes,
        default=[],
        metavar="N,N,...",
        help="numbers of added pieces, on the first base",
    )
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweep's curve there")
    given = arguments.parse_args()

    domains = kobest_texts(given.kobest)
    domains |= {name: [document.text for document in read_documents(path)] for name, path in given.heldout}
    english = [line for d in read_documents(given.english) for line in d.text.splitlines() if line.strip()]
    config = TokenizerConfig(vocab_size=given.vocab_size, max_added=given.max_added, balance=given.balance)
    hybrids = []
    with tempfile.TemporaryDirectory() as folder:
        for name, base in given.base:
            if base.suffix == ".gguf":
                base = Path(folder) / "tokenizer.json"
                base.write_text(json.dumps(byte_level_json(dict(given.base)[name])), encoding="utf-8")
            hybrids.append({"base": name, **measure(base, given.korean, config, domains, english)})
            print(name, hybrids[-1]["ratios"], hybrids[-1].get("plain"))
    swept = {}
    if given.sweep:
        enough = msgspec.structs.replace(config, vocab_size=max(given.vocab_size, 2 * max(given.sweep)))
        rows = sweep_sizes(documents_of(given.korean), given.base[0][1], enough, given.sweep, domains)
        bend = knee([row.added for row in rows], [row.mean_ratio for row in rows])
        swept = {"sweep": {"base": given.base[0][0], "vocab_size": enough.vocab_size, "knee": bend}}
        swept["sweep"]["sizes"] = msgspec.to_builtins(rows)
        if given.plot:
            from redwhale.engine.sweep_plot import plot_sweep

            plot_sweep(rows, bend, given.plot)
    write_result(
        given.result,
        __file__,
        {
            "config": msgspec.to_builtins(config),
            "training_files": [path.name for path in given.korean],
            "hybrids": hybrids,
            **swept,
        },
        data=[
            *(*given.korean, given.kobest, given.english),
            *(path for _, path in given.base),
            *(path for _, path in given.heldout),
        ],
    )


if __name__ == "__main__":
    main()

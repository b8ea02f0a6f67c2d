"""Token ratio of hybrid tokenizers by domain and base, and whether tokenizer.json gives the ids of tokenizer.model.

For each base and character coverage a hybrid is built from the Korean files. Beside it stands the same set of pieces
appended with score 0, a common shortcut.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from common import parser, write_result

from redwhale.filtering import read_documents
from redwhale.tokenizer import (
    ModelProto,
    Tokenizer,
    TokenizerConfig,
    build_hybrid_tokenizer,
    load_model_proto,
    unreachable_pieces,
)
from redwhale.tokenizer.export import tokenizer_json
from redwhale.tokenizer.hybrid import count_parity


def texts_of(files: list[Path]) -> Iterator[str]:
    """Texts of all documents, in order."""
    for file in files:
        for document in read_documents(file):
            yield document.text


def with_score_zero(hybrid: ModelProto, base_pieces: int) -> ModelProto:
    """The hybrid with score 0 for every piece that is not of the base."""
    proto = ModelProto()
    proto.CopyFrom(hybrid)
    for piece in list(proto.pieces)[base_pieces:]:
        piece.score = 0.0
    return proto


def parity_of(proto: ModelProto, lines: list[str]) -> dict[str, int]:
    """How many lines get other ids from the tokenizer.json made of `proto` than from `proto` itself."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
        # Not export_hf_tokenizer: it refuses tied scores, and here we want to see what they would do.
        (folder / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer_json(proto)))
        counted = count_parity(Tokenizer(folder / "tokenizer.model"), folder, lines)
    if counted is None:
        raise SystemExit("parity needs the package tokenizers: pip install tokenizers")
    return {"lines": counted[0], "mismatches": counted[1]}


def unreachable(proto: ModelProto, base_pieces: int) -> dict[str, int]:
    """How many pieces of the base, and how many new ones, no text is ever encoded to."""
    ids = unreachable_pieces(proto, range(len(proto.pieces)))
    return {"base": sum(i < base_pieces for i in ids), "new": sum(i >= base_pieces for i in ids)}


def measure(
    base_path: Path, korean: list[Path], config: TokenizerConfig, domains: dict[str, list[str]]
) -> dict[str, Any]:
    """Build the hybrid and measure it on the held-out documents and their lines."""
    base = load_model_proto(base_path)
    size = len(base.pieces)
    with tempfile.TemporaryDirectory() as output:
        summary = build_hybrid_tokenizer(texts_of(korean), base_path, Path(output), config, domains=domains)
        hybrid = load_model_proto(Path(output) / "tokenizer.model")
        tokenizer = Tokenizer(Path(output) / "tokenizer.model")
    added = [piece.piece for piece in list(hybrid.pieces)[size:]]
    byte_tokens = {
        domain: sum(tokenizer.processor.is_byte(i) for ids in tokenizer.encode_batch(texts) for i in ids)
        for domain, texts in domains.items()
    }
    lines = [line for texts in domains.values() for text in texts for line in text.splitlines() if line.strip()]
    zero = with_score_zero(hybrid, size)
    return {
        "base_pieces": size,
        "trained_hangul_pieces": summary.trained_hangul_pieces,
        "overlap": summary.overlap,
        "added": summary.added,
        "added_single_syllables": sum(len(piece) == 1 for piece in added),
        "dropped_unreachable": len(summary.dropped_unreachable),
        "domains": {
            domain.domain: {**msgspec.to_builtins(domain), "hybrid_byte_tokens": byte_tokens[domain.domain]}
            for domain in summary.domains
        },
        "documents_parity": {"documents": summary.parity_texts, "mismatches": summary.parity_mismatches},
        "lines_parity": parity_of(hybrid, lines),
        "unreachable": {"base_alone": unreachable(base, size)["base"], **unreachable(hybrid, size)},
        "score_zero": {"lines_parity": parity_of(zero, lines), "unreachable": unreachable(zero, size)},
    }


def named_path(text: str) -> tuple[str, Path]:
    """NAME=PATH as a pair."""
    name, separator, path = text.partition("=")
    if not separator or not name or not Path(path).is_file():
        raise ValueError(text)
    return name, Path(path)


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "token_ratio")
    arguments.add_argument("korean", nargs="+", type=Path, help="files of Korean text to train on")
    arguments.add_argument("--base", type=named_path, action="append", required=True, metavar="NAME=MODEL")
    arguments.add_argument("--heldout", type=named_path, action="append", required=True, metavar="DOMAIN=FILE")
    arguments.add_argument("--vocab-size", type=int, default=24_000, help="of the Korean BPE (default: %(default)s)")
    arguments.add_argument("--max-added", type=int, default=20_000, help="pieces to add (default: %(default)s)")
    arguments.add_argument("--coverage", type=float, nargs="+", default=[0.9999], help="character coverages to compare")
    given = arguments.parse_args()

    domains = {name: [document.text for document in read_documents(path)] for name, path in given.heldout}
    hybrids = []
    for name, base in given.base:
        for coverage in given.coverage:
            config = TokenizerConfig(
                vocab_size=given.vocab_size, max_added=given.max_added, character_coverage=coverage
            )
            row = {"base": name, "character_coverage": coverage, **measure(base, given.korean, config, domains)}
            hybrids.append(row)
            ratios = ", ".join(f"{domain} {counts['ratio']:.3f}" for domain, counts in row["domains"].items())
            print(f"{name}, coverage {coverage}: {ratios}")
            print(f"  parity {row['lines_parity']}, with score 0 {row['score_zero']}")
    write_result(
        given.result,
        __file__,
        {
            "vocab_size": given.vocab_size,
            "max_added": given.max_added,
            "training_files": [path.name for path in given.korean],
            "training_text_bytes": sum(len(text.encode(errors="replace")) for text in texts_of(given.korean)),
            "heldout_files": {name: path.name for name, path in given.heldout},
            "hybrids": hybrids,
        },
        data=[*given.korean, *(path for _, path in given.base), *(path for _, path in given.heldout)],
    )


if __name__ == "__main__":
    main()

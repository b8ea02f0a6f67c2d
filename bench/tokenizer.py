"""Encoding speed on one vocabulary (ours, sentencepiece, tokenizers; documents on one thread), and training time.

Training reads the given files over and over until a sample of the given size is full, so that it takes as long as on a
corpus of that size with as many distinct words as the files have.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# One thread for tokenizers too; read when the package is first used.
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from common import QuietTimer, parser, peak_memory_mb, write_result

from redwhale.filtering import read_documents
from redwhale.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    build_hybrid_tokenizer,
    check_tokenizer,
    open_encoder,
)
from redwhale.tokenizer.chunked_encoder import ChunkedEncoder


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "tokenizer")
    arguments.add_argument("base", type=Path, help="a SentencePiece .model")
    arguments.add_argument("korean", nargs="+", type=Path, help="Korean text to train on and to encode")
    arguments.add_argument("--english", type=Path, required=True, help="English text to encode")
    arguments.add_argument("--training-bytes", type=int, default=1_000_000_000)
    arguments.add_argument("--megabytes", type=int, default=4, help="of text to encode, each language")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--patience", type=float, default=600)
    given = arguments.parse_args()

    def endless():
        for turn in itertools.count():
            for path in given.korean:
                for document in read_documents(path):
                    yield path.name.split(".")[0], f"{document.text}\n{turn}"

    def filled():
        size = 0
        for source, text in endless():
            size += len(text.encode(errors="replace"))
            if size > given.training_bytes:
                return
            yield source, text

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = TokenizerConfig(balance=0.3, max_training_bytes=given.training_bytes)
        began = time.perf_counter()
        build_hybrid_tokenizer(filled(), given.base, folder, config, domains={})
        trained = time.perf_counter() - began
        began = time.perf_counter()
        report = check_tokenizer(folder, base=given.base)
        proved = time.perf_counter() - began
        memory = peak_memory_mb()
        model, exported = Tokenizer(folder / "tokenizer.model"), open_encoder(folder / "tokenizer.json")
        chunked = ChunkedEncoder(model)
        encoders: dict[str, Callable[[str], object]] = {
            "redwhale": chunked.encode,
            "sentencepiece": model.processor.encode,
            "tokenizers": exported.encode,
        }
        timer = QuietTimer(given.patience)
        speeds = {}
        for language, paths in (("korean", given.korean), ("english", [given.english])):
            texts, size = [], 0
            for document in itertools.chain.from_iterable(map(read_documents, paths)):
                texts.append(document.text)
                size += len(document.text.encode())
                if size > given.megabytes * 1e6:
                    break
            seconds: dict[str, list[float]] = {encoder: [] for encoder in encoders}
            for _ in range(given.repeats):  # interleaved
                for encoder, encode in encoders.items():
                    seconds[encoder].append(timer.time(lambda e=encode, t=texts: [e(text) for text in t])[0])
            speeds[language] = {e: round(size / 1e6 / statistics.median(taken), 2) for e, taken in seconds.items()}
            print(language, "MB/s", speeds[language])
    write_result(
        given.result,
        __file__,
        {
            "megabytes_per_second": speeds,
            "training_bytes": given.training_bytes,
            "build_seconds": round(trained, 1),
            "proof_seconds": round(proved, 1),
            "failed_proofs": sum(bool(check.failed) for check in report.checks),
            "peak_memory_mb": memory,
            "timer": timer.described(),
        },
        data=[given.base, *given.korean, given.english],
    )


if __name__ == "__main__":
    main()

"""Tokenisation speed on one core: ours, sentencepiece and tokenizers, on the same texts and with the same ids.

Every call takes Python strings in NFC and gives token ids in the form that is cheapest for it: bytes of uint16 (ours),
lists (sentencepiece, given batches and given text by text), lists of encodings (tokenizers). Speed is MB of UTF-8 per
second of CPU time. Last comes the whole of `redwhale pack`, files in and shards out, by the clock.
"""

import os

os.environ["RAYON_NUM_THREADS"] = "1"  # of tokenizers, which reads it when it is loaded
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from common import PROJECT, QuietTimer, parser, write_result

from redwhale.filtering import find_inputs, read_documents
from redwhale.filtering.workers import available_cores
from redwhale.tokenizer import Tokenizer, export_hf_tokenizer, load_model_proto
from redwhale.tokenizer.chunked_encoder import ChunkedEncoder
from redwhale.tokenizer.spm import nfc

AT_ONCE = 1000


def sample(files: list[Path], megabytes: float, seed: int = 0) -> list[str]:
    """Documents of all files in one shuffled order, up to a number of MB of UTF-8."""
    texts = [nfc(document.text) for path in files for document in read_documents(path)]
    random.Random(seed).shuffle(texts)
    chosen, size = [], 0
    for text in texts:
        if size >= megabytes * 1e6:
            break
        chosen.append(text)
        size += len(text.encode())
    return chosen


def in_batches(encode: Callable[[list[str]], list[Any]], texts: list[str]) -> list[Any]:
    """`encode` of a thousand texts at a time."""
    return list(chain.from_iterable(encode(texts[i : i + AT_ONCE]) for i in range(0, len(texts), AT_ONCE)))


def measure(model: Path, texts: list[str], passes: int, timer: QuietTimer) -> dict[str, Any]:
    """MB/s of each way to the ids of `texts`, and whether the ids are the same."""
    tokenizer = Tokenizer(model)
    spm = tokenizer.processor
    with tempfile.TemporaryDirectory() as name:
        export_hf_tokenizer(load_model_proto(model), Path(name))
        fast = import_module("tokenizers").Tokenizer.from_file(str(Path(name) / "tokenizer.json"))

    encoder = ChunkedEncoder(tokenizer)
    ways: dict[str, Callable[[], list[Any]]] = {
        "sentencepiece, batches": lambda: in_batches(lambda some: spm.encode(some, num_threads=1), texts),
        "sentencepiece, one by one": lambda: [spm.encode(text) for text in texts],
        "tokenizers, batches": lambda: [
            encoding.ids
            for encoding in in_batches(lambda some: fast.encode_batch_fast(some, add_special_tokens=False), texts)
        ],
        "ours": lambda: [encoder.encode_bytes(text) for text in texts],
    }
    text_bytes = sum(len(text.encode()) for text in texts)
    speeds: dict[str, float] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, list[Any]] = {}
    for _ in range(passes):
        for way, call in ways.items():
            _, (took, found[way]) = timer.time(lambda call=call: cpu_time(call))
            seconds[way].append(took)
    for way, took in seconds.items():
        speeds[way] = round(text_bytes / 1e6 / statistics.median(took), 2)
        print(f"{way}: {speeds[way]} MB/s")
    expected = found["sentencepiece, one by one"]
    found["ours"] = [np.frombuffer(ids, encoder.dtype).tolist() for ids in found["ours"]]
    differing = {way: sum(a != b for a, b in zip(expected, ids, strict=True)) for way, ids in found.items()}
    return {
        "model": f"{model.parent.name}/{model.name}",
        "pieces": tokenizer.vocab_size,
        "tokens": sum(map(len, expected)),
        "mb_per_cpu_second": speeds,
        "texts_with_other_ids_than_sentencepiece": differing,
    }


def cpu_time(call: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    """CPU seconds of all threads of one call, and what it returned."""
    began = time.process_time()
    output = call()
    return time.process_time() - began, output


def pack_speeds(model: Path, files: list[Path], text_bytes: int, timer: QuietTimer) -> list[dict[str, Any]]:
    """MB/s of text of the whole pack step, by processes."""
    speeds = []
    for workers in sorted({1, available_cores()}):
        with tempfile.TemporaryDirectory() as name:
            shards = {Path(name) / f"train-{number:05d}": [path] for number, path in enumerate(files)}
            seconds, _ = timer.time(lambda shards=shards, workers=workers: _pack(shards, model, workers))
        speeds.append({"workers": workers, "mb_per_second": round(text_bytes / 1e6 / seconds, 2)})
        print(f"pack with {workers} workers: {speeds[-1]['mb_per_second']} MB/s")
    return speeds


def _pack(shards: dict[Path, list[Path]], model: Path, workers: int) -> None:
    # Here, so that the worker processes, which import this file, do not wait for torch as it does.
    from redwhale.engine.packing import pack_files

    for prefix in shards:
        for suffix in (".bin", ".idx", ".json"):
            prefix.with_name(prefix.name + suffix).unlink(missing_ok=True)
    pack_files(shards, Tokenizer(model), workers=workers)


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "pack")
    bundled = PROJECT / "recipes" / "quickstart" / "crawl_good.jsonl"
    arguments.add_argument("corpus", nargs="*", type=Path, default=[bundled], help="files and folders of text")
    models = [PROJECT / f"{folder}/tokenizer.model" for folder in ("runs/quickstart/tokenizer", "quickstart-data")]
    arguments.add_argument("--models", nargs="+", type=Path, default=models, help="SentencePiece models, hybrid first")
    arguments.add_argument("--megabytes", type=float, default=32, help="of text that is encoded (default: %(default)s)")
    arguments.add_argument("--passes", type=int, default=3, help="of each way (default: %(default)s)")
    arguments.add_argument("--patience", type=float, default=300, help="seconds to wait for a quiet machine")
    arguments.add_argument("--most-share", type=float, default=0.1, help="of all cores that others may take")
    given = arguments.parse_args()
    files = find_inputs(given.corpus)
    texts = sample(files, given.megabytes)
    timer = QuietTimer(given.patience, given.most_share)
    encoders = []
    for model in given.models:
        print(f"{model.parent.name}/{model.name}")
        encoders.append(measure(model, texts, given.passes, timer))
    text_bytes = sum(len(document.text.encode()) for path in files for document in read_documents(path))
    write_result(
        given.result,
        __file__,
        {
            "files": [path.name for path in files],
            "texts": len(texts),
            "text_bytes": sum(len(text.encode()) for text in texts),
            "encoders": encoders,
            "pack_text_bytes": text_bytes,
            "pack": pack_speeds(given.models[0], files, text_bytes, timer),
            **timer.described(),
        },
        data=[*given.corpus, *given.models],
    )


if __name__ == "__main__":
    main()

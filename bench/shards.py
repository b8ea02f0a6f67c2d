"""Loader throughput on one core: ours, a bare numpy read, torch's DataLoader over a memory map, and litdata.

All read the same tokens, hundreds of millions in a temporary folder, in a shuffled order, and give int64 tensors on the
host. Ours alone also gives the targets, the documents' boundaries and the positions. The numpy read, of random windows
and nothing else, is the limit. litdata is measured where it is installed.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import QuietTimer, parser, write_result

from redwhale.engine import BatchLoader, PackedSequences, TokenShards
from redwhale.engine.prefetch import prefetched
from redwhale.engine.shards import ShardWriter

VOCAB_SIZE = 36_000
MEAN_DOCUMENT = 600
SHARDS = 4


def write_tokens(folder: Path, tokens: int) -> None:
    """Shards of random tokens in documents of geometric length."""
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        with ShardWriter(folder / f"train-{number:05d}", vocab_size=VOCAB_SIZE, tokenizer_sha256="none") as writer:
            for _ in range(tokens // SHARDS // 1_000_000):
                lengths = rng.geometric(1 / MEAN_DOCUMENT, 3 * 1_000_000 // MEAN_DOCUMENT)
                lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), 1_000_000))]
                lengths = np.append(lengths, 1_000_000 - lengths.sum())
                writer.add(rng.integers(0, VOCAB_SIZE, 1_000_000, dtype=np.uint16), lengths, 1)


def ours(folder: Path, length: int, size: int, prefetch: bool) -> Iterator[int]:
    """Tokens of each micro-batch of `BatchLoader`."""
    loader = BatchLoader(
        PackedSequences(TokenShards.open(folder, "train"), length), batch_size=8 * size, micro_batch_size=size, seed=0
    )
    steps = range(len(loader.source) // loader.batch_size)
    batches = (batch for _, some in prefetched(loader, steps) for batch in some)
    plain = (batch for step in steps for batch in loader.micro_batches(step))
    for batch in batches if prefetch else plain:
        yield len(batch.input_ids)


def numpy_windows(folder: Path, length: int, size: int) -> Iterator[int]:
    """Random windows of the memory-mapped files, cast to int64 and stacked."""
    maps = [np.memmap(path, dtype="<u2", mode="r").view(np.ndarray) for path in sorted(folder.glob("*.bin"))]
    rng = np.random.default_rng(0)
    batch = np.empty((size, length), dtype=np.int64)
    for _ in range(sum(map(len, maps)) // (length * size)):
        for row, which in zip(batch, rng.integers(0, len(maps), size).tolist(), strict=True):
            start = int(rng.integers(0, len(maps[which]) - length))
            row[:] = maps[which][start : start + length]
        yield batch.size


class Windows(torch.utils.data.Dataset):
    """Consecutive windows of the memory-mapped files as (inputs, targets)."""

    def __init__(self, folder: Path, length: int) -> None:
        self.maps = [np.memmap(path, dtype="<u2", mode="r").view(np.ndarray) for path in sorted(folder.glob("*.bin"))]
        self.length = length
        self.per_file = (len(self.maps[0]) - 1) // length

    def __len__(self) -> int:
        return self.per_file * len(self.maps)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        which, place = divmod(index, self.per_file)
        window = self.maps[which][place * self.length : (place + 1) * self.length + 1].astype(np.int64)
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])


def torch_loader(folder: Path, length: int, size: int) -> Iterator[int]:
    """Tokens of each batch of torch's DataLoader, in this process."""
    generator = torch.Generator().manual_seed(0)
    windows = Windows(folder, length)
    for inputs, _ in torch.utils.data.DataLoader(windows, batch_size=size, shuffle=True, generator=generator):
        yield inputs.numel()


def _million(index: int) -> torch.Tensor:
    path, begin = _MILLIONS[index]
    return torch.from_numpy(np.fromfile(path, dtype="<u2", count=1_000_000, offset=2 * begin).astype(np.int32))


_MILLIONS: list[tuple[Path, int]] = []


def write_litdata(folder: Path, target: Path, length: int) -> None:
    """The same tokens in litdata's format for token streams."""
    litdata = import_module("litdata")
    for path in sorted(folder.glob("*.bin")):
        _MILLIONS.extend((path, begin) for begin in range(0, path.stat().st_size // 2, 1_000_000))
    litdata.optimize(
        fn=_million,
        inputs=list(range(len(_MILLIONS))),
        output_dir=str(target),
        num_workers=1,
        chunk_bytes="64MB",
        item_loader=litdata.TokensLoader(block_size=length),
        start_method="fork",
    )


def litdata_loader(folder: Path, length: int, size: int) -> Iterator[int]:
    """Tokens of each batch of litdata's StreamingDataLoader, in this process."""
    litdata = import_module("litdata")
    dataset = litdata.StreamingDataset(
        str(folder), item_loader=litdata.TokensLoader(block_size=length), shuffle=True, drop_last=True, seed=0
    )
    for batch in litdata.StreamingDataLoader(dataset, batch_size=size, num_workers=0):
        yield batch.to(torch.int64).numel()


def rate(make: Callable[[], Iterator[int]], seconds: float, passes: int, timer: QuietTimer) -> float:
    """Millions of tokens per second, the median of some passes that each begin behind a warm-up."""
    found = []
    for _ in range(passes):
        batches = chain.from_iterable(make() for _ in count())
        for _, _ in zip(range(50), batches, strict=False):
            pass
        took, tokens = timer.time(lambda batches=batches: _consume(batches, seconds))
        found.append(tokens / took / 1e6)
    return round(float(np.median(found)), 1)


def _consume(batches: Iterator[int], seconds: float) -> int:
    ends, tokens = time.perf_counter() + seconds, 0
    for more in batches:
        tokens += more
        if time.perf_counter() > ends:
            break
    return tokens


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "shards")
    arguments.add_argument("--tokens", type=int, default=240_000_000, help="in all shards (default: %(default)s)")
    arguments.add_argument("--length", type=int, default=4096, help="of a sequence (default: %(default)s)")
    arguments.add_argument("--seconds", type=float, default=0.4, help="of each pass (default: %(default)s)")
    arguments.add_argument("--passes", type=int, default=5, help="of each loader (default: %(default)s)")
    arguments.add_argument("--patience", type=float, default=300, help="seconds to wait for a quiet machine")
    arguments.add_argument("--most-share", type=float, default=0.1, help="of all cores that others may take")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    timer = QuietTimer(given.patience, given.most_share)
    work = Path(tempfile.mkdtemp())
    try:
        shards = work / "shards"
        shards.mkdir()
        write_tokens(shards, given.tokens)
        loaders: dict[str, Callable[[int], Iterator[int]]] = {
            "numpy, random windows": lambda size: numpy_windows(shards, given.length, size),
            "ours": lambda size: ours(shards, given.length, size, prefetch=False),
            "ours, prefetched by a thread": lambda size: ours(shards, given.length, size, prefetch=True),
            "torch DataLoader over a memory map": lambda size: torch_loader(shards, given.length, size),
        }
        try:
            version = metadata.version("litdata")
        except metadata.PackageNotFoundError:
            version = None
        else:
            write_litdata(shards, work / "litdata", given.length)
            loaders["litdata"] = lambda size: litdata_loader(work / "litdata", given.length, size)
        speeds = []
        for size in (2, 8):
            row: dict[str, Any] = {"micro_batch_size": size}
            for name, make in loaders.items():
                row[name] = rate(lambda make=make, size=size: make(size), given.seconds, given.passes, timer)
                print(f"{name}, {size} sequences: {row[name]} M tokens/s")
            speeds.append(row)
    finally:
        shutil.rmtree(work)
    write_result(
        given.result,
        __file__,
        {
            "tokens": given.tokens,
            "mean_document_tokens": MEAN_DOCUMENT,
            "sequence_length": given.length,
            "threads": 1,
            "litdata": version,
            "million_tokens_per_second": speeds,
            **timer.described(),
        },
    )


if __name__ == "__main__":
    main()

"""Lines that stand in many documents of the corpus: menus, footers, notices, licence texts.

After pattern-aware line-level deduplication (PLD, arXiv 2510.24139): a line in more than 50 documents goes, one in 4 to
50 where its neighbours are as frequent. Different from it, a frequent line stays in about 50 documents, chosen by their
content, so that what is frequent and right (a clause of every statute) is still learnt; and a short line, which may be
a reply or a heading, goes only beside other frequent lines. Documents that are dropped for another reason do not count:
an article that sixty sites copied has no frequent lines.
"""

import hashlib
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .duplicates import connect, quoted, surviving_rows
from .work import WorkFolder, temporary_name
from .workers import Mapper

SHORT = 10
"""Characters below which a line goes only beside other frequent ones."""


class FrequentLines:
    """Lines in at least `block_documents` documents, and in how many each is; see `without` for what becomes of them.

    Args:
        hashes: uint64, ascending.
        documents: uint64, as many.
    """

    def __init__(self, hashes: np.ndarray, documents: np.ndarray, *, line_documents: int, block_documents: int):
        self._hashes = hashes
        self._documents = documents
        self._line_documents = line_documents
        self._block_documents = block_documents

    @classmethod
    def load(cls, folder: WorkFolder, *, line_documents: int, block_documents: int) -> "FrequentLines":
        """Maps what `count_lines` wrote."""
        hashes, documents = np.asarray(np.load(folder.need("frequent_lines.npy"), mmap_mode="r"))
        return cls(hashes, documents, line_documents=line_documents, block_documents=block_documents)

    def documents(self, lines: Sequence[str]) -> np.ndarray:
        """In how many documents each line stands (int64); 0 for those that are not frequent."""
        if not len(self._hashes) or not lines:
            return np.zeros(len(lines), dtype=np.int64)
        hashes = np.array([line_hash(line) for line in lines], dtype=np.uint64)
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[place] == hashes, self._documents[place], 0).astype(np.int64)

    def without(self, texts: Sequence[str], content_ids: Sequence[int]) -> list[str]:
        """Returns normalised texts without their boilerplate lines, and with no more than one blank line in a row.

        A content id decides whether a document is among the about `line_documents` that keep a frequent line.
        """
        lines = [text.split("\n") for text in texts]
        filled = [[place for place, line in enumerate(some) if line.strip()] for some in lines]
        counts = self.documents([some[place] for some, places in zip(lines, filled, strict=True) for place in places])
        ends = np.cumsum([0, *map(len, filled)])
        of_texts = [counts[start:end] for start, end in itertools.pairwise(ends)]
        return [
            self._without(text, some, places, count, content)
            for text, some, places, count, content in zip(texts, lines, filled, of_texts, content_ids, strict=True)
        ]

    def _without(self, text: str, lines: list[str], filled: list[int], counts: np.ndarray, content_id: int) -> str:
        """One text; `counts` are those of the lines at the places `filled`, which are all that are not blank."""
        often = counts >= self._block_documents
        if not often.any():
            return text
        before = np.concatenate(([False], often[:-1]))
        after = np.concatenate((often[1:], [False]))
        block = often & before & after
        # At the edge of the document one frequent neighbour is enough.
        block[0] = often[0] and after[0]
        block[-1] = often[-1] and before[-1]
        long = np.array([len(lines[place].strip()) >= SHORT for place in filled])
        frequent = counts > self._line_documents
        boilerplate = block | (frequent & (long | before | after))
        stays = frequent & (content_id / 2**64 * counts < self._line_documents)
        gone = {filled[place] for place in np.flatnonzero(boilerplate & ~stays)}
        if not gone:
            return text
        kept = "\n".join(line for place, line in enumerate(lines) if place not in gone)
        while "\n\n\n" in kept:
            kept = kept.replace("\n\n\n", "\n\n")
        return kept.strip()


def line_hash(line: str) -> int:
    """Returns 64 bits of BLAKE2b of a line without the white space around it."""
    return int.from_bytes(hashlib.blake2b(line.strip().encode("utf-8"), digest_size=8).digest(), "little")


def count_lines(folder: WorkFolder, names: Sequence[str], block_documents: int, *, settings: Any, map_: Mapper) -> None:
    """Writes `frequent_lines.npy`, uint64 [2, lines]: hashes and documents of lines in at least `block_documents`.

    Counts the documents that pass the rules and repeat no other. `settings` opens the database.
    """
    result = folder.path / "frequent_lines.npy"
    if result.exists():
        folder.keep(result)
        return
    counted = folder.path / "lines"
    for _ in map_(partial(count_lines_of_shard, folder=folder), names):
        pass
    folder.gather("lines")
    temporary = result.with_name("frequent_lines.tmp.npy")
    with connect(folder, **settings) as database:
        table = database.execute(
            f"""SELECT hash, sum(documents)::UBIGINT AS documents FROM read_parquet('{quoted(counted / "*.parquet")}')
            GROUP BY hash HAVING sum(documents) >= {block_documents} ORDER BY hash"""
        ).fetchnumpy()
    np.save(temporary, np.stack([table["hash"], table["documents"]]).astype(np.uint64))
    temporary.replace(result)
    folder.keep(result)


def count_lines_of_shard(name: str, *, folder: WorkFolder) -> None:
    """Writes `lines/NAME.parquet`: the hash of each line of a shard and the number of documents that have it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder.path / "lines" / f"{name}.parquet"
    if folder.find(f"lines/{name}.parquet") is not None:
        return
    hashes: list[int] = []
    texts = folder.documents(name).column("text")
    for row in surviving_rows(folder, name):
        hashes += {line_hash(line) for line in texts[row].as_py().split("\n") if line.strip()}
    unique, counts = np.unique(np.array(hashes, dtype=np.uint64), return_counts=True)
    temporary = temporary_name(path)
    pq.write_table(pa.table({"hash": unique, "documents": counts.astype(np.uint32)}), temporary, use_dictionary=False)
    temporary.replace(path)
    folder.keep(path)

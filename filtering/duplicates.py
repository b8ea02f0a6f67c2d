"""Exact and near-duplicates across the whole corpus: joins on the disk by DuckDB, candidates verified by their texts.

Of exact duplicates the first in input order stays. A near-duplicate is dropped only for a document that itself stays,
that is better, and whose true Jaccard similarity with it reaches the threshold: chains of similar documents never
collapse into one. What stays depends on the texts alone, not on workers, shards or the order of files.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .errors import CorpusError
from .language_model import load_model
from .minhash import jaccard, shingles
from .work import BAND_COLUMNS, WorkFolder, locate, positions_of, temporary_name, write_atomically
from .workers import Mapper

_PAIRS_PER_GROUP = 20_480
_EDGES_AT_A_TIME = 1_000_000
_CHARACTERS_PER_BATCH, _PAIRS_PER_BATCH = 1 << 21, 1 << 15
# Larger buckets are those of templates: a document in one meets the best of it and those just before it in rank, so
# that the pairs of a bucket grow as its documents do, not as their square.
_BEST_OF_BUCKET, _NEIGHBOURS = 32, 8


def find_bounds(folder: WorkFolder, low: float, high: float, *, memory_gb: float, threads: int) -> None:
    """Writes `bounds.json`: [lowest, highest] allowed for each score of the language model.

    They cut these shares of the documents that pass the rules, copies counted: of two scores each cuts half of them.
    """
    result = folder.path / "bounds.json"
    if result.exists():
        folder.keep(result)
        return
    columns = load_model(folder.language_model).columns
    shares = f"{low / columns}, {1 - high / columns}"
    with connect(folder, memory_gb, threads) as database:
        quantiles = ", ".join(f"quantile_disc(model_{column}, [{shares}])" for column in range(columns))
        (bounds,) = database.execute(f"SELECT {quantiles} FROM documents WHERE failed = 0").fetchall()
    write_atomically(result, msgspec.json.encode(bounds))
    folder.keep(result)


def improbable_rows(folder: WorkFolder, name: str) -> set[int]:
    """Returns the rows of a shard that pass the rules and lie beyond the bounds of the language model."""
    path = folder.find("bounds.json")
    if path is None:
        return set()
    measured = folder.measurements(name)
    failed = measured.column("failed").to_numpy() != 0
    beyond = np.zeros(len(failed), dtype=bool)
    for column, bounds in enumerate(msgspec.json.decode(path.read_bytes())):
        if bounds is not None:
            scores = measured.column(f"model_{column}").to_numpy()
            beyond |= (scores < bounds[0]) | (scores > bounds[1])
    return set(np.flatnonzero(beyond & ~failed).tolist())


def find_duplicates(folder: WorkFolder, threshold: float, *, memory_gb: float, threads: int, map_: Mapper) -> Path:
    """Writes and returns `duplicates.parquet`: position (sorted), of, jaccard.

    `of` is the position of what a near-duplicate repeats, and null for exact duplicates; of those all but the first are
    listed, of near-duplicates only documents that pass the rules. A threshold of 1 looks for exact ones alone.
    """
    result = folder.path / "duplicates.parquet"
    if result.exists():
        folder.keep(result)
        return result
    with connect(folder, memory_gb, threads) as database:
        database.execute(
            "CREATE TABLE firsts AS SELECT content_id, min(position) AS position FROM documents GROUP BY content_id"
        )
        database.execute('CREATE TABLE near (position BIGINT, "of" BIGINT, jaccard FLOAT)')
        if threshold < 1:
            _rank(database, folder)
            pairs = folder.path / "pairs.parquet"
            if not pairs.exists():
                _write_pairs(database, pairs)
            folder.keep(pairs)
            groups = range(_parquet_file(pairs).num_row_groups)
            for _ in map_(partial(verify_pairs, folder=folder, threshold=threshold), groups):
                pass
            folder.gather("edges")
            if groups:
                _insert_near(database, folder.path / "edges")
        temporary = result.with_suffix(".tmp")
        database.execute(
            f"""COPY (
                SELECT position, NULL::BIGINT AS "of", 1::FLOAT AS jaccard FROM documents
                ANTI JOIN firsts USING (position)
                UNION ALL SELECT * FROM near ORDER BY position
            ) TO '{quoted(temporary)}' (FORMAT parquet, ROW_GROUP_SIZE 16384)"""
        )
    temporary.replace(result)
    folder.keep(result)
    return result


def connect(folder: WorkFolder, memory_gb: float, threads: int) -> Any:
    """Returns a DuckDB connection with the view `documents` of all measured shards, which spills into the work folder.

    Raises CorpusError when duckdb is not installed.
    """
    try:
        import duckdb
    except ImportError as error:
        raise CorpusError('filtering needs duckdb: pip install "redwhale[filtering]"') from error
    spill = folder.path / "spill"
    spill.mkdir(exist_ok=True)
    settings = {"memory_limit": f"{memory_gb}GB", "threads": threads, "temp_directory": str(spill)}
    database = duckdb.connect(config={**settings, "preserve_insertion_order": False})
    files = quoted(folder.measured / "*.parquet")
    database.execute(f"CREATE VIEW documents AS SELECT * FROM read_parquet('{files}')")
    return database


def duplicates_of_shard(folder: WorkFolder, name: str) -> dict[int, int | None]:
    """Returns the rows of a shard that repeat another document: near-duplicates with its position, others with None."""
    import pyarrow.parquet as pq

    first, beyond = positions_of(name)
    inside = [("position", ">=", first), ("position", "<", beyond)]
    table = pq.read_table(folder.need("duplicates.parquet"), columns=["position", "of"], filters=inside)
    return {
        position - first: of for position, of in zip(*(column.to_pylist() for column in table.columns), strict=True)
    }


def surviving_rows(folder: WorkFolder, name: str) -> list[int]:
    """Returns the rows of a shard that pass the rules, are probable, and repeat no other document."""
    gone = improbable_rows(folder, name) | duplicates_of_shard(folder, name).keys()
    failed = folder.measurements(name).column("failed").to_pylist()
    return [row for row, rules in enumerate(failed) if not rules and row not in gone]


def _rank(database: Any, folder: WorkFolder) -> None:
    """The table `ranked`: documents that pass the rules, exact duplicates left out, the best first."""
    bounds = folder.path / "bounds.json"
    allowed = "".join(
        f" AND model_{column} BETWEEN {pair[0]!r} AND {pair[1]!r}"
        for column, pair in enumerate(msgspec.json.decode(bounds.read_bytes()) if bounds.exists() else [])
        if pair is not None
    )
    database.execute(
        f"""CREATE TABLE ranked AS
        SELECT row_number() OVER (ORDER BY quality DESC, bytes_out DESC, content_id) - 1 AS rank, position
        FROM documents SEMI JOIN firsts USING (position) WHERE failed = 0{allowed}"""
    )


def _write_pairs(database: Any, path: Path) -> None:
    """Pairs of documents that share a band, in the order in which their texts lie."""
    database.execute("CREATE TABLE pairs (better BIGINT, worse BIGINT)")
    for band in BAND_COLUMNS:
        database.execute(
            f"""INSERT INTO pairs
            WITH keyed AS (SELECT {band} AS key, rank FROM documents JOIN ranked USING (position)),
            bucket AS (
                SELECT key, rank, row_number() OVER (PARTITION BY key ORDER BY rank) AS place FROM keyed
                QUALIFY count(*) OVER (PARTITION BY key) > 1
            )
            SELECT a.rank, b.rank FROM bucket a JOIN bucket b ON a.key = b.key
            WHERE a.place <= {_BEST_OF_BUCKET} AND a.place < b.place
            UNION ALL
            SELECT a.rank, b.rank FROM
            (SELECT key, rank, place - unnest(range(1, {_NEIGHBOURS + 1})) AS place FROM bucket
             WHERE place > {_BEST_OF_BUCKET}) b
            JOIN bucket a ON a.key = b.key AND a.place = b.place"""
        )
    temporary = path.with_suffix(".tmp")
    database.execute("SET preserve_insertion_order = true")
    database.execute(
        f"""COPY (
            SELECT better, worse, b.position AS better_position, w.position AS worse_position
            FROM (SELECT DISTINCT better, worse FROM pairs)
            JOIN ranked b ON b.rank = better JOIN ranked w ON w.rank = worse
            ORDER BY worse_position, better_position
        ) TO '{quoted(temporary)}' (FORMAT parquet, ROW_GROUP_SIZE {_PAIRS_PER_GROUP})"""
    )
    database.execute("DROP TABLE pairs")
    temporary.replace(path)


def verify_pairs(group: int, *, folder: WorkFolder, threshold: float) -> int:
    """Writes those pairs of a row group of `pairs.parquet` that reach the threshold, and returns how many there are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder.path / "edges" / f"{group:06d}.parquet"
    if folder.find(f"edges/{path.name}") is None:
        table = _parquet_file(folder.need("pairs.parquet")).read_row_group(group)
        left, right = (table.column(f"{side}_position").to_pylist() for side in ("better", "worse"))
        similarity = np.concatenate(list(_similarities(folder, left, right)))
        table = table.select(["better", "worse"]).append_column("jaccard", pa.array(similarity))
        temporary = temporary_name(path)
        pq.write_table(table.filter(pa.array(similarity >= threshold)), temporary)
        temporary.replace(path)
        folder.keep(path)
    return _parquet_file(path).metadata.num_rows


def _similarities(folder: WorkFolder, left: Sequence[int], right: Sequence[int]) -> Iterator[np.ndarray]:
    """Jaccard similarities of pairs of positions, a bounded amount of text at a time."""
    texts = _Texts(folder)
    places: dict[int, int] = {}
    loaded: list[str] = []
    pairs: list[tuple[int, int]] = []
    characters = 0
    for pair in zip(left, right, strict=True):
        for position in pair:
            if position not in places:
                places[position] = len(loaded)
                loaded.append(texts[position])
            characters += len(loaded[places[position]])
        pairs.append((places[pair[0]], places[pair[1]]))
        if characters >= _CHARACTERS_PER_BATCH or len(pairs) == _PAIRS_PER_BATCH:
            yield jaccard(shingles(loaded), *np.array(pairs).T)
            places, loaded, pairs, characters = {}, [], [], 0
    if pairs:
        yield jaccard(shingles(loaded), *np.array(pairs).T)


class _Texts:
    """Texts by position, out of mapped files of which only those used last stay open."""

    def __init__(self, folder: WorkFolder, most_open: int = 256):
        self._folder = folder
        self._most_open = most_open
        self._open: dict[str, Any] = {}

    def __getitem__(self, position: int) -> str:
        name, row = locate(position)
        column = self._open.pop(name, None)
        if column is None:
            column = self._folder.documents(name).column("text")
        self._open[name] = column
        if len(self._open) > self._most_open:
            del self._open[next(iter(self._open))]
        return column[row].as_py()


def _insert_near(database: Any, edges: Path) -> None:
    """Goes from the best document to the worst, and drops what reaches the threshold with a document that stays."""
    source = f"read_parquet('{quoted(edges / '*.parquet')}')"
    ((documents,),) = database.execute("SELECT count(*) FROM ranked").fetchall()
    dropped = bytearray(documents)
    reader = database.cursor()
    reader.execute(f"SELECT worse, better, jaccard FROM {source} ORDER BY worse, jaccard DESC, better")
    while edges_read := reader.fetchmany(_EDGES_AT_A_TIME):
        repeats = []
        for worse, better, similarity in edges_read:
            if not dropped[worse] and not dropped[better]:
                dropped[worse] = 1
                repeats.append((worse, better, similarity))
        _insert_repeats(database, repeats)


def _insert_repeats(database: Any, repeats: list[tuple[int, int, float]]) -> None:
    import pyarrow as pa

    schema = pa.schema([("rank", pa.int64()), ("of_rank", pa.int64()), ("jaccard", pa.float32())])
    columns = [[row[column] for row in repeats] for column in range(len(schema))]
    database.register("repeats", pa.table(columns, schema=schema))
    database.execute(
        """INSERT INTO near SELECT r.position, o.position, jaccard FROM repeats
        JOIN ranked r USING (rank) JOIN ranked o ON o.rank = of_rank"""
    )
    database.unregister("repeats")


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def quoted(path: Path) -> str:
    """Returns a path to put between single quotes in SQL."""
    return str(path).replace("'", "''")

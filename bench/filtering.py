"""The whole filter against datatrove on the same real documents; near-duplicates alone against datasketch and rensa.

Every pipeline reads JSON lines and writes what it keeps, each in a process of its own with one worker; speed is MB of
text per second of CPU time, which other processes disturb little. datatrove runs Gopher's repetition and quality rules,
FineWeb's quality rules with FineWeb2's Korean thresholds, its masking and MinHash with 14 bands of 8: once on words
split at white space, which costs it nothing, and once with Kiwi, which it takes for Korean.

Near-duplicates: each tool finds them among real documents and edited copies of them; every pair is compared by brute
force for recall (pairs with Jaccard of 0.85 and more of which one goes) and for the pairs below 0.7 that it reports.

Needs datatrove, kiwipiepy, xxhash below 4 (for datatrove), datasketch and rensa.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from common import PROJECT, parser, peak_memory_mb, write_result

from redwhale.filtering import (
    RULES,
    FilterConfig,
    MeasureOptions,
    Threshold,
    content_id,
    filter_corpus,
    find_inputs,
    normalize_text,
    read_documents,
)
from redwhale.filtering.duplicates import find_duplicates
from redwhale.filtering.minhash import band_keys, shingles
from redwhale.filtering.work import WorkFolder, cut_into_shards, cut_into_units, measure_shard
from redwhale.filtering.workers import Workers

CORPUS_MB = 121_600
"""The raw corpus of RedWhale (arXiv 2408.11294)."""

# Thresholds of FineWeb2 for kor_Hang (arXiv 2506.20920).
FINEWEB2_TOP = ((2, 0.282), (3, 0.228), (4, 0.185))
FINEWEB2_DUPLICATE = ((5, 0.201), (6, 0.184), (7, 0.168), (8, 0.154), (9, 0.14), (10, 0.127))


def sample(inputs: list[Path], megabytes: float, path: Path) -> float:
    """Writes documents of all files, chosen by content, evenly by file; returns their megabytes of text."""
    total = 0
    files = find_inputs([str(one) for one in inputs])
    with path.open("w", encoding="utf-8") as out:
        for file in files:
            size = 0
            for document in sorted(read_documents(file), key=lambda one: content_id(normalize_text(one.text))):
                if size > megabytes * 1e6 / len(files):
                    break
                text = document.text.encode("utf-8", "replace").decode("utf-8")
                size += len(text.encode("utf-8"))
                row = {"id": f"{file.name}:{document.id}", "text": text, "source": document.source}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            total += size
    return total / 1e6


def redwhale(corpus: Path, output: Path) -> int:
    """The whole pipeline with its defaults; documents kept."""
    return filter_corpus(FilterConfig(inputs=[str(corpus)], workers=1), output).documents_out


def datatrove(corpus: Path, output: Path, tokenizer: str) -> int:
    """The equivalent pipeline of datatrove; documents kept."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.filters import (
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LambdaFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.word_tokenizers import KiwiTokenizer, WordTokenizer

    class SpaceTokenizer(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return text.splitlines()

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError

    words: Any = KiwiTokenizer("cong") if tokenizer == "kiwi" else SpaceTokenizer()
    config = MinhashConfig()

    def is_korean(document: Any) -> bool:
        text = document.text
        return sum("가" <= character <= "힣" for character in text) >= 0.25 * len("".join(text.split()))

    def run(name: str, steps: list[Any], tasks: int = 1) -> None:
        LocalPipelineExecutor(pipeline=steps, tasks=tasks, workers=1, logging_dir=str(output / "logs" / name)).run()

    rules = [
        JsonlReader(str(corpus.parent), glob_pattern=corpus.name),
        LambdaFilter(is_korean),
        GopherRepetitionFilter(
            dup_line_frac=0.374, top_n_grams=FINEWEB2_TOP, dup_n_grams=FINEWEB2_DUPLICATE, language=words
        ),
        FineWebQualityFilter(line_punct_thr=0.062, new_line_ratio=0.196, language=words),
        GopherQualityFilter(
            min_avg_word_length=1, max_non_alpha_words_ratio=0.791, min_stop_words=0, stop_words=["은"], language=words
        ),
        PIIFormatter(),
        JsonlWriter(str(output / "filtered")),
    ]
    run("rules", rules)
    filtered = JsonlReader(str(output / "filtered"))
    run("signatures", [filtered, MinhashDedupSignature(str(output / "sig"), config=config, language=words)])
    buckets = MinhashDedupBuckets(str(output / "sig"), str(output / "buckets"), config=config)
    run("buckets", [buckets], tasks=config.num_buckets)
    run("cluster", [MinhashDedupCluster(str(output / "buckets"), str(output / "remove"), config=config)])
    remove = MinhashDedupFilter(str(output / "remove"))
    run("kept", [JsonlReader(str(output / "filtered")), remove, JsonlWriter(str(output / "kept"))])
    return sum(1 for file in find_inputs([str(output / "kept")]) for _ in read_documents(file))


def timed(name: str, corpus: str) -> dict[str, Any]:
    """CPU seconds, peak memory and documents kept of one pipeline, in this process and those it starts."""
    pipelines: dict[str, Callable[[Path, Path], int]] = {
        "redwhale": redwhale,
        "datatrove": lambda path, output: datatrove(path, output, "whitespace"),
        "datatrove_kiwi": lambda path, output: datatrove(path, output, "kiwi"),
    }
    with tempfile.TemporaryDirectory() as output:
        began, wall = sum(os.times()[:4]), time.perf_counter()
        kept = pipelines[name](Path(corpus), Path(output))
        return {
            "cpu_seconds": round(sum(os.times()[:4]) - began, 2),
            "wall_seconds": round(time.perf_counter() - wall, 2),
            "peak_memory_mb": peak_memory_mb(),
            "documents_kept": kept,
        }


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a process of its own, so that memory and caches are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def edited_copies(texts: list[str], count: int) -> list[str]:
    """Copies of random texts with a few characters replaced and a twentieth of the spaces gone."""
    rng = random.Random(0)
    copies = []
    for _ in range(count):
        share = rng.choice((0, 0.002, 0.005, 0.01, 0.02))
        text = texts[rng.randrange(len(texts))]
        changed = (chr(rng.randrange(0xAC00, 0xD7A4)) if rng.random() < share else one for one in text)
        copies.append("".join(one for one in changed if one != " " or rng.random() > 0.05))
    return copies


def grams(text: str) -> set[str]:
    """The same shingles for every tool: 8 characters without white space."""
    squeezed = "".join(text.split())
    return {squeezed[start : start + 8] for start in range(max(len(squeezed) - 7, 1))}


def near_redwhale(texts: list[str]) -> tuple[float, set[int], set[tuple[int, int]]]:
    """CPU seconds, documents dropped, and (dropped, kept) pairs; measuring the rules is not counted."""
    import pyarrow.parquet as pq

    off = MeasureOptions(thresholds={name: Threshold(enabled=False) for name in RULES}, mask=())
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "a.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        folder = WorkFolder(Path(temporary) / "work")
        folder.open({})
        for shard in cut_into_shards(cut_into_units([corpus], 1)[0], 1 << 30):
            measure_shard(shard, folder=folder, options=off, html=False)
        began = time.process_time()
        for start in range(0, len(texts), 64):
            band_keys(shingles(texts[start : start + 64]))
        with Workers(1) as pool:
            result = find_duplicates(folder, 0.8, memory_gb=2, threads=1, map_=pool.map)
        seconds = time.process_time() - began
        rows = [row for row in pq.read_table(result).to_pylist() if row["of"] is not None]
        return seconds, {row["position"] for row in rows}, {(row["position"], row["of"]) for row in rows}


def near_datasketch(texts: list[str]) -> tuple[float, set[int], set[tuple[int, int]]]:
    """MinHashLSH of 128 permutations; a document goes when an earlier one that stays is found."""
    from datasketch import MinHash, MinHashLSH

    began = time.process_time()
    lsh = MinHashLSH(threshold=0.8, num_perm=128)
    dropped, pairs = set(), set()
    for place, text in enumerate(texts):
        signature = MinHash(num_perm=128)
        signature.update_batch([gram.encode("utf-8") for gram in grams(text)])
        found = [int(one) for one in lsh.query(signature)]
        if found:
            dropped.add(place)
            pairs |= {(place, one) for one in found}
        else:
            lsh.insert(str(place), signature)
    return time.process_time() - began, dropped, pairs


def near_rensa(texts: list[str]) -> tuple[float, set[int], set[tuple[int, int]]]:
    """RMinHash of 128 permutations with its LSH; a document goes when an earlier one that stays is found."""
    from rensa import RMinHash, RMinHashLSH

    began = time.process_time()
    lsh = RMinHashLSH(threshold=0.8, num_perm=128, num_bands=16)
    dropped, pairs = set(), set()
    for place, text in enumerate(texts):
        signature = RMinHash(num_perm=128, seed=1)
        signature.update(list(grams(text)))
        found = lsh.query(signature)
        if found:
            dropped.add(place)
            pairs |= {(place, one) for one in found}
        else:
            lsh.insert(place, signature)
    return time.process_time() - began, dropped, pairs


def near_duplicates(texts: list[str]) -> dict[str, Any]:
    """Speed, recall and precision of each tool against brute force."""
    sys.path.insert(0, str(PROJECT / "tests"))
    from filtering_corpus import alike_pairs

    alike = alike_pairs([grams(text) for text in texts], least=0.5)
    near = [pair for pair, similarity in alike.items() if similarity >= 0.85]
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    results: dict[str, Any] = {"documents": len(texts), "text_mb": round(megabytes, 2), "pairs_at_0.85": len(near)}
    for name, find in (("redwhale", near_redwhale), ("datasketch", near_datasketch), ("rensa", near_rensa)):
        seconds, dropped, pairs = in_a_fresh_process(find, texts)
        missed = sum(one not in dropped and other not in dropped for one, other in near)
        low = sum(alike.get((min(pair), max(pair)), 0.0) < 0.7 for pair in pairs)
        results[name] = {
            "cpu_seconds": round(seconds, 2),
            "documents_per_cpu_second": round(len(texts) / seconds),
            "mb_per_cpu_second": round(megabytes / seconds, 2),
            "recall_at_0.85": round(1 - missed / len(near), 4),
            "pairs": len(pairs),
            "pairs_below_0.7": low,
        }
        print(name, results[name])
    return results


def first_texts(inputs: list[Path], most: int) -> Iterator[str]:
    """The first characters of the first documents of every file."""
    for file in find_inputs([str(one) for one in inputs]):
        for document in itertools.islice(read_documents(file), most):
            yield normalize_text(document.text[:1500])


def distinct(texts: Iterable[str]) -> list[str]:
    """Texts without exact repetitions, which every tool finds."""
    return list({hashlib.blake2b(text.encode()).digest(): text for text in texts if text}.values())


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "filtering")
    arguments.add_argument("inputs", nargs="+", type=Path, help="files and folders of raw Korean text")
    arguments.add_argument("--near", nargs="+", type=Path, required=True, help="files for the near-duplicates")
    arguments.add_argument("--megabytes", type=float, default=20, help="of text (default: %(default)s)")
    arguments.add_argument("--kiwi-megabytes", type=float, default=2, help="of text with Kiwi (default: %(default)s)")
    given = arguments.parse_args()

    speeds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        sizes = {}
        for name, megabytes in (("all", given.megabytes), ("few", given.kiwi_megabytes)):
            (Path(temporary) / name).mkdir()
            sizes[name] = sample(given.inputs, megabytes, Path(temporary) / name / "a.jsonl")
        for name, corpus in (("redwhale", "all"), ("datatrove", "all"), ("datatrove_kiwi", "few")):
            found = in_a_fresh_process(timed, name, str(Path(temporary) / corpus / "a.jsonl"))
            rate = sizes[corpus] / found["cpu_seconds"]
            speeds[name] = {
                "text_mb": round(sizes[corpus], 2),
                **found,
                "mb_per_cpu_second": round(rate, 3),
                "core_hours_for_121.6_gb": round(CORPUS_MB / rate / 3600, 1),
            }
            print(name, speeds[name])
    ours = speeds["redwhale"]["mb_per_cpu_second"]
    for name in ("datatrove", "datatrove_kiwi"):
        speeds[name]["redwhale_is_faster_by"] = round(ours / speeds[name]["mb_per_cpu_second"], 2)
    originals = distinct(first_texts(given.near, 1400))
    texts = distinct([*originals, *edited_copies(originals, max(0, 5000 - len(originals)))])
    write_result(
        given.result,
        __file__,
        {"pipelines": speeds, "near_duplicates": near_duplicates(texts)},
        data=[*given.inputs, *given.near],
    )


if __name__ == "__main__":
    main()

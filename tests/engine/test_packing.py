import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny import english_texts, korean_texts, write_jsonl

from redwhale.engine import load_recipe, packing, run_recipe, token_blocks
from redwhale.engine.errors import RecipeError
from redwhale.engine.packing import pack_files, pack_texts
from redwhale.engine.recipe import PackConfig
from redwhale.engine.shards import TokenShards
from redwhale.tokenizer import Tokenizer

SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture(scope="module")
def tokenizer(tiny_root) -> Tokenizer:
    return Tokenizer(tiny_root / "data" / "tokenizer.model")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def documents_of(shards: TokenShards) -> list[list[int]]:
    stream = shards.read(0, shards.tokens)
    return [part.tolist() for part in np.split(stream, shards.document_ends(0, shards.tokens))[:-1]]


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """Files of three kinds, one of them empty, with text that NFC changes."""
    files = [tmp_path / "in" / name for name in ("a.jsonl", "b.jsonl", "c.txt")]
    write_jsonl(files[0], ({"text": text} for text in english_texts()))
    write_jsonl(files[1], ())
    files[2].write_text("\n".join(korean_texts()) + "\u1112\u1161\u11ab", encoding="utf-8")
    return files


def expected_documents(texts, tokenizer) -> list[list[int]]:
    return [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def test_a_document_becomes_bos_its_sentencepiece_ids_and_eos(tmp_path, tokenizer):
    texts = [*english_texts(), *korean_texts(), "\u1112\u1161\u11ab", ""]
    manifest = pack_texts(texts, tokenizer, tmp_path / "train-00000")
    shards = TokenShards.open(tmp_path, "train", tokenizer_sha256=tokenizer.sha256, verify=True)
    assert documents_of(shards) == expected_documents(texts, tokenizer)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.documents == len(texts)


def test_no_text_is_an_empty_shard(tmp_path, tokenizer):
    assert pack_texts([], tokenizer, tmp_path / "x-00000").documents == 0
    assert TokenShards.open(tmp_path, "x", verify=True).tokens == 0


def test_shards_are_the_same_for_any_number_of_workers_and_any_batches(tmp_path, tokenizer, corpus, monkeypatch):
    packed = []
    for workers, batch_bytes in ((1, 1 << 20), (2, 1 << 20), (2, 5_000), (1, 1)):
        folder = tmp_path / f"{workers}-{batch_bytes}"
        folder.mkdir()
        monkeypatch.setattr(token_blocks, "BATCH_BYTES", batch_bytes)
        monkeypatch.setattr(packing, "_WORKERS_PAY_FROM_BYTES", 0)
        shards = {folder / f"train-{number:05d}": [path] for number, path in enumerate(corpus)}
        pack_files({**shards, folder / "all-00000": corpus}, tokenizer, workers=workers)
        packed.append(contents(folder))
    assert packed[0] == packed[1] == packed[2] == packed[3]
    together = TokenShards.open(folder, "all", verify=True)
    assert documents_of(together) == documents_of(TokenShards.open(folder, "train", verify=True))
    texts = [*english_texts(), "\n".join(korean_texts()) + "\u1112\u1161\u11ab"]
    assert documents_of(together) == expected_documents(texts, tokenizer)


def test_workers_give_pack_texts_the_same_shard(tmp_path, tokenizer):
    texts = english_texts() * 40
    one = pack_texts(texts, tokenizer, tmp_path / "one", workers=1)
    assert pack_texts(texts, tokenizer, tmp_path / "two", workers=2) == one


def test_an_interrupted_run_goes_on_behind_its_whole_shards(tmp_path, tokenizer, corpus):
    prefixes = [tmp_path / f"train-{number:05d}" for number in range(3)]
    whole = dict(zip(prefixes, [[path] for path in corpus], strict=True))
    pack_files(whole, tokenizer)
    expected = contents(tmp_path)
    before = prefixes[0].with_suffix(".json").stat().st_mtime_ns
    for suffix in SUFFIXES:  # as a crash in the third file leaves it
        path = prefixes[2].with_suffix(suffix)
        path.rename(path.with_name(path.name + ".writing")) if suffix == ".bin" else path.unlink()
    done = []
    pack_files(whole, tokenizer, on_bytes=done.append)
    assert contents(tmp_path) == expected
    assert prefixes[0].with_suffix(".json").stat().st_mtime_ns == before
    assert sum(done) == sum(path.stat().st_size for path in corpus)


def test_unpaired_surrogates_become_replacement_characters_and_pairs_are_joined(tmp_path, tokenizer):
    path = tmp_path / "crawled.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00 c"}\n', encoding="utf-8")
    pack_files({tmp_path / "x-00000": [path]}, tokenizer)
    shards = TokenShards.open(tmp_path, "x")
    assert [tokenizer.decode(ids) for ids in documents_of(shards)] == ["a \ufffd b", "😀 c"]
    assert shards.text_bytes == len("a \ufffd b😀 c".encode())


@pytest.mark.parametrize("name", ["train", "validation", "corpus", "heldout", "heldout-english", "English", "a/b", ""])
def test_extra_corpora_cannot_take_names_of_other_shards(name):
    with pytest.raises(msgspec.ValidationError, match="extra corpus"):
        msgspec.convert({"extra": {name: ["x.jsonl"]}}, PackConfig)


@pytest.fixture(scope="module")
def packed_run(tiny_root, tmp_path_factory):
    """The tiny recipe's filter, tokenizer and pack steps, with an extra corpus of two files."""
    root = tmp_path_factory.mktemp("extra")
    write_jsonl(root / "english" / "1.jsonl", ({"text": text} for text in english_texts()[2:5]))
    write_jsonl(root / "english" / "2.jsonl", ({"text": text} for text in english_texts()[5:9]))
    overrides = [f'runs="{root}/runs"', f'pack.extra.english-web=["{root}/english"]']
    recipe = load_recipe(tiny_root / "tiny.toml", overrides)
    for step in ("filter", "tokenizer", "pack"):
        run_recipe(recipe, only=step, say=lambda line: None)
    return recipe, root


def test_the_step_packs_extra_corpora_and_heldout_domains_beside_the_corpus(packed_run):
    recipe, _ = packed_run
    folder = recipe.run_dir / "pack"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert {path.stem for path in folder.glob("*.idx")} == {
        *("train-00000", "validation-00000", "english-web-00000", "english-web-00001", "heldout-english-00000")
    }
    assert set(manifest["outputs"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    tokenizer = Tokenizer(recipe.run_dir / "tokenizer" / "tokenizer.model")
    for name, texts in (("english-web", english_texts()[2:9]), ("heldout-english", english_texts()[:2])):
        shards = TokenShards.open(folder, name, tokenizer_sha256=tokenizer.sha256, verify=True)
        assert documents_of(shards) == expected_documents(texts, tokenizer)
        summary = manifest["summary"][name]
        sizes = (len(texts), shards.tokens, sum(len(text.encode()) for text in texts))
        assert (summary["documents"], summary["tokens"], summary["text_bytes"]) == sizes


def test_the_step_is_done_again_when_an_extra_or_heldout_file_changes(packed_run):
    recipe, root = packed_run

    def lines() -> list[str]:
        said: list[str] = []
        run_recipe(recipe, only="pack", say=said.append)
        return said

    assert lines() == ["pack: up to date"]
    write_jsonl(root / "english" / "2.jsonl", ({"text": text} for text in english_texts()[5:8]))
    assert "up to date" not in lines()[0]
    assert TokenShards.open(recipe.run_dir / "pack", "english-web").documents == 6
    manifest = json.loads((recipe.run_dir / "pack" / "manifest.json").read_text(encoding="utf-8"))
    assert any(name.startswith("heldout.english") for name in manifest["inputs"])


def test_a_heldout_domain_that_cannot_name_a_file_is_refused(packed_run):
    recipe, _ = packed_run
    heldout = {"a/b": recipe.heldout["english"]}
    with pytest.raises(RecipeError, match="held-out domain 'a/b' names shards"):
        run_recipe(msgspec.structs.replace(recipe, heldout=heldout), only="pack", say=lambda line: None)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redwhale.engine.errors import ShardError
from redwhale.engine.shards import ShardWriter, TokenShards, write_shard

DOCUMENTS = [[1, 5, 6, 2], [1, 2], [1, 7, 8, 9, 10, 2]]


def write(prefix, documents, vocab_size=100, sha="a" * 64):
    return write_shard(prefix, ((ids, 3 * len(ids)) for ids in documents), vocab_size=vocab_size, tokenizer_sha256=sha)


@settings(max_examples=30, deadline=None)
@given(
    shards=st.lists(st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=5), min_size=1, max_size=4),
    data=st.data(),
)
def test_several_shards_read_as_one_stream(tmp_path_factory, shards, data):
    folder = tmp_path_factory.mktemp("shards")
    for number, documents in enumerate(shards):
        write(folder / f"train-{number:05d}", documents)
    stream = [token for documents in shards for ids in documents for token in ids]
    opened = TokenShards.open(folder, "train", verify=True)
    assert opened.tokens == len(stream)
    assert opened.documents == sum(map(len, shards))
    assert opened.text_bytes == 3 * len(stream)
    start = data.draw(st.integers(0, len(stream)))
    end = data.draw(st.integers(start, len(stream)))
    assert opened.read(start, end).tolist() == stream[start:end]
    ends, position = [], 0
    for documents in shards:
        for ids in documents:
            position += len(ids)
            ends.append(position)
    assert opened.document_ends(start, end).tolist() == sorted({e for e in ends if start < e <= end})
    assert opened.count_document_ends(start, end) == len({e for e in ends if start < e <= end})


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(2**16, 2), (2**16 + 1, 4)])
def test_tokens_take_two_bytes_only_where_the_vocabulary_fits(tmp_path, vocab_size, itemsize):
    write(tmp_path / "train-00000", [[vocab_size - 1, 0]], vocab_size=vocab_size)
    assert (tmp_path / "train-00000.bin").stat().st_size == 2 * itemsize
    assert TokenShards.open(tmp_path, "train").read(0, 2).tolist() == [vocab_size - 1, 0]


def test_the_written_bytes_are_those_of_the_specification(tmp_path):
    write(tmp_path / "x", DOCUMENTS)
    assert np.fromfile(tmp_path / "x.bin", dtype="<u2").tolist() == [t for ids in DOCUMENTS for t in ids]
    assert np.fromfile(tmp_path / "x.idx", dtype="<i8").tolist() == [0, 4, 6, 12]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_shard_is_refused_with_both_sizes(tmp_path, suffix):
    write(tmp_path / "train-00000", DOCUMENTS)
    path = tmp_path / f"train-00000{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ShardError, match=f"has {len(whole) - 1} bytes but its manifest says {len(whole)}: it is trunc"):
        TokenShards.open(tmp_path, "train")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_flipped_bit_is_found_on_demand(tmp_path, suffix):
    write(tmp_path / "train-00000", DOCUMENTS)
    path = tmp_path / f"train-00000{suffix}"
    data = bytearray(path.read_bytes())
    data[8] ^= 1  # of the index: the first document's end
    path.write_bytes(data)
    TokenShards.open(tmp_path, "train")
    with pytest.raises(ShardError, match="does not match its checksum"):
        TokenShards.open(tmp_path, "train", verify=True)


def test_a_damaged_index_is_refused_before_it_misleads(tmp_path):
    write(tmp_path / "train-00000", DOCUMENTS)
    for offsets in ([0, 6, 4, 12], [1, 4, 6, 12], [0, 4, 6, 11]):
        np.asarray(offsets, dtype="<i8").tofile(tmp_path / "train-00000.idx")
        with pytest.raises(ShardError, match="does not count from 0 up to the 12 tokens"):
            TokenShards.open(tmp_path, "train")


def test_verify_finds_a_token_outside_the_vocabulary_that_checksums_cannot(tmp_path):
    write(tmp_path / "train-00000", DOCUMENTS)
    path = tmp_path / "train-00000.json"
    path.write_bytes(path.read_bytes().replace(b'"vocab_size": 100', b'"vocab_size": 10'))
    shards = TokenShards.open(tmp_path, "train")
    with pytest.raises(ShardError, match="holds token 10, outside the vocabulary of 10"):
        shards.verify()


def test_a_dtype_that_the_vocabulary_does_not_have_is_refused(tmp_path):
    write(tmp_path / "train-00000", DOCUMENTS)
    path = tmp_path / "train-00000.json"
    path.write_bytes(path.read_bytes().replace(b"uint16", b"uint32"))
    with pytest.raises(ShardError, match="dtype 'uint32', which is not that of 100 pieces"):
        TokenShards.open(tmp_path, "train")


def test_a_split_is_not_taken_for_another_that_begins_with_its_name(tmp_path):
    write(tmp_path / "english-00000", DOCUMENTS)
    write(tmp_path / "english-2-00000", DOCUMENTS * 2)
    (tmp_path / "english-notes.json").write_text("{}")
    assert TokenShards.open(tmp_path, "english").documents == 3
    assert TokenShards.open(tmp_path, "english-2").documents == 6


def test_a_shard_written_in_blocks_is_that_written_by_documents(tmp_path):
    write(tmp_path / "one", DOCUMENTS)
    with ShardWriter(tmp_path / "blocks", vocab_size=100, tokenizer_sha256="a" * 64) as writer:
        writer.add(np.array(DOCUMENTS[0] + DOCUMENTS[1], dtype=np.uint16), [4, 2], 18)
        writer.add(np.empty(0, dtype=np.uint16), [], 0)
        writer.add(np.array(DOCUMENTS[2]), np.array([6]), 18)
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"blocks{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}{suffix}" for name in ("one", "blocks") for suffix in (".bin", ".idx", ".json")
    )


def test_a_block_names_the_document_outside_the_vocabulary(tmp_path):
    def write_two_blocks() -> None:
        with ShardWriter(tmp_path / "x", vocab_size=10, tokenizer_sha256="a") as writer:
            writer.add(np.array([1, 2]), [2], 1)
            writer.add(np.array([1, 2, 3, 10, 4]), [2, 1, 2], 1)

    with pytest.raises(ShardError, match="document 3 holds a token outside the vocabulary of 10"):
        write_two_blocks()
    assert not (tmp_path / "x.json").exists()


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    write(tmp_path / "train-00000", DOCUMENTS, sha="b" * 64)
    with pytest.raises(ShardError, match="made with another tokenizer"):
        TokenShards.open(tmp_path, "train", tokenizer_sha256="c" * 64)


def test_a_crash_while_writing_leaves_no_shard(tmp_path):
    def documents():
        yield [1, 2], 3
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_shard(tmp_path / "train-00000", documents(), vocab_size=10, tokenizer_sha256="a")
    with pytest.raises(ShardError, match="holds no token shard"):
        TokenShards.open(tmp_path, "train")


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ShardError, match="document 1 holds a token outside the vocabulary of 10"):
        write(tmp_path / "x", [[1], [10]], vocab_size=10)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path / "train-00000", DOCUMENTS)
    (tmp_path / "train-00000.bin").unlink()
    with pytest.raises(ShardError, match=r"train-00000\.bin is missing"):
        TokenShards.open(tmp_path, "train")

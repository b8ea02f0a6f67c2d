import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redwhale.engine.errors import ShardError
from redwhale.engine.shards import TokenShards, write_shard

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
    assert opened.document_ends(start, end).tolist() == [e for e in ends if start < e <= end]


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
    data[-1] ^= 1
    path.write_bytes(data)
    TokenShards.open(tmp_path, "train")
    with pytest.raises(ShardError, match="does not match its checksum"):
        TokenShards.open(tmp_path, "train", verify=True)


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

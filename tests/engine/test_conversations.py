import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redwhale.engine.conversations import BadRow, Message, messages_of, read_conversations
from redwhale.engine.errors import USER_ERRORS, DataError

PAIR = (Message("user", "a"), Message("assistant", "b"))
MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "extra": 1}
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
ALPACA = {"instruction": "a", "input": "", "output": "b"}


@pytest.mark.parametrize("row", [MESSAGES, SHAREGPT, ALPACA, {"conversations": MESSAGES["messages"]}])
def test_the_three_shapes_say_the_same(row):
    assert messages_of(row) == (PAIR, None)


def test_what_the_shapes_have_beside_the_question():
    system = Message("system", "s")
    assert messages_of({**SHAREGPT, "system": "s"}) == ((system, *PAIR), None)
    assert messages_of({**SHAREGPT, "conversations": [{"from": "system", "value": "s"}, *SHAREGPT["conversations"]]})[
        0
    ] == (system, *PAIR)
    alpaca = {"instruction": "translate", "input": "word", "output": "낱말", "system": "s", "history": [["a", "b"]]}
    expected = (system, *PAIR, Message("user", "translate\n\nword"), Message("assistant", "낱말"))
    assert messages_of(alpaca) == (expected, None)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([], "not an object"),
        ({"text": "x"}, "no messages, no conversations, no instruction with output; keys: text"),
        ({"messages": "x"}, "messages is not a list"),
        ({"messages": ["x"]}, "a turn is not an object"),
        ({"messages": [{"role": "user"}]}, "neither role and content nor from and value"),
        ({"messages": [{"role": "user", "content": 3}]}, "is not text"),
        ({"instruction": "a", "output": None}, "is not text"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "not a pair"),
    ],
)
def test_rows_without_messages_say_why(row, problem):
    messages, found = messages_of(row)
    assert messages == ()
    assert found is not None
    assert problem in found


def test_bad_rows_are_listed_with_their_line_and_the_rest_is_used(tmp_path):
    rows = [
        json.dumps(MESSAGES),
        "{broken",
        json.dumps({"text": "x"}),
        json.dumps({"messages": [{"role": "user", "content": "a"}]}),
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}),
        json.dumps({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}),
        json.dumps({"messages": []}),
        "",
        json.dumps({"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        json.dumps({"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]}),
        json.dumps(SHAREGPT),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    conversations, bad = read_conversations([path])
    assert [(c.messages, c.row) for c in conversations] == [(PAIR, 1), (PAIR, 11)]
    assert [row.row for row in bad] == [2, 3, 4, 5, 6, 7, 9, 10]
    assert {row.file for row in bad} == {str(path)}
    reasons = ["not JSON", "no messages", "must alternate", "is empty", "not text", "found none", "'tool'", "surrogate"]
    assert all(expected in row.reason for expected, row in zip(reasons, bad, strict=True))
    assert str(BadRow("f", 3, "why")) == "f:3: why"


def test_every_kind_of_file_gives_the_same_conversations(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in [MESSAGES, SHAREGPT]).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps([MESSAGES, SHAREGPT], indent=1))
    # A parquet row has every column, null where its shape has none.
    nulls = dict.fromkeys(("messages", "conversations", "instruction"))
    pq.write_table(pa.Table.from_pylist([{**nulls, **MESSAGES}, {**nulls, **SHAREGPT}]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"):
        conversations, bad = read_conversations([tmp_path / name])
        assert [conversation.messages for conversation in conversations] == [PAIR, PAIR], name
        assert bad == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.jsonl", b"", "no usable row"),
        ("latin.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("array.json", b"[{}, ", "begins like one JSON array"),
        ("a.parquet", b"PAR1 not", "no readable parquet"),
        ("a.jsonl.gz", b"not gzip", "damaged"),
    ],
)
def test_files_that_cannot_be_used_are_one_sentence(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(USER_ERRORS, match=message):
        read_conversations([tmp_path / name])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl does not exist"):
        read_conversations([tmp_path / "missing.jsonl"])

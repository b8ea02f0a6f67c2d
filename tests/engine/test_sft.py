import json

import numpy as np
import pytest
import torch
from tiny import tiny_model

from redwhale.engine.batches import IGNORE_INDEX, Batch, ExampleSequences
from redwhale.engine.errors import DataError
from redwhale.engine.sft import (
    CHAT_TEMPLATE,
    Message,
    encode_conversation,
    encode_conversations,
    read_conversations,
    segments,
)
from redwhale.tokenizer import Tokenizer, export_hf_tokenizer, load_model_proto

CHATS = [
    [Message("user", "안녕하세요?"), Message("assistant", "네, 안녕하세요.")],
    [
        Message("system", "You are terse."),
        Message("user", "One?"),
        Message("assistant", "1"),
        Message("user", "Two?"),
        Message("assistant", "2"),
    ],
    [Message("user", "two\nlines"), Message("assistant", "a\nb\n")],
]


@pytest.fixture(scope="module")
def tokenizer(tiny_root):
    return Tokenizer(tiny_root / "data" / "tokenizer.model")


@pytest.fixture(scope="module")
def exported(tiny_root, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    proto = load_model_proto(tiny_root / "data" / "tokenizer.model")
    export_hf_tokenizer(proto, folder, chat_template=CHAT_TEMPLATE)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("messages", CHATS)
def test_segments_render_what_transformers_renders_from_the_template(exported, messages):
    raw = [{"role": m.role, "content": m.content} for m in messages]
    ours = "".join(f" {text}</s>" if is_answer else text for text, is_answer in segments(messages))
    assert ours == exported.apply_chat_template(raw, tokenize=False)
    prompt = [*raw, {"role": "user", "content": "Next?"}]
    rendered = exported.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert rendered == ours + "\nHuman: Next?\nAssistant:"


@pytest.mark.parametrize("messages", CHATS[:2])
def test_training_ids_are_the_ids_that_transformers_gives_at_inference(exported, tokenizer, messages):
    raw = [{"role": m.role, "content": m.content} for m in messages]
    theirs = exported(exported.apply_chat_template(raw, tokenize=False))["input_ids"]
    ids, _ = encode_conversation(messages, tokenizer)
    assert ids == theirs


def test_targets_are_the_answers_and_their_ends_and_nothing_else(tokenizer):
    ids, targets = encode_conversation(CHATS[1], tokenizer)
    predicted = [(i, t) for i, t in enumerate(targets) if t != IGNORE_INDEX]
    for i, target in predicted:
        assert ids[i + 1] == target
    answers = [*tokenizer.encode("1"), tokenizer.eos_id, *tokenizer.encode("2"), tokenizer.eos_id]
    assert [target for _, target in predicted] == answers


def test_no_prompt_token_contributes_gradient_as_a_target():
    """The loss is a function of the answer's log-probabilities alone: change a masked target, nothing changes."""
    model = tiny_model().requires_grad_(True)
    ids = [1, 10, 11, 12, 13, 2]
    targets = np.asarray([IGNORE_INDEX, IGNORE_INDEX, 12, 13, 2, IGNORE_INDEX])
    batch = Batch.collate([ExampleSequences([(ids, targets.tolist())], 8, 0).sequence(0)])
    output = model.loss(batch.input_ids, batch.targets, batch.documents)
    output.loss_sum.backward()
    logits = tiny_model()(batch.input_ids, batch.documents)
    manual = tiny_model().requires_grad_(True)
    log_p = torch.log_softmax(manual(batch.input_ids, batch.documents), -1)
    (-(log_p[2, 12] + log_p[3, 13] + log_p[4, 2])).backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), manual.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert batch.num_targets == 3
    assert output.token_losses[[0, 1, 5]].tolist() == [0, 0, 0]
    assert logits.shape == (6, 97)


def test_bad_rows_are_listed_with_their_line_and_the_rest_is_used(tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "extra": 1}
    rows = [
        json.dumps(good),
        "{broken",
        json.dumps({"text": "x"}),
        json.dumps({"messages": [{"role": "user", "content": "a"}]}),
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}),
        json.dumps({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}),
        json.dumps({"messages": []}),
        "",
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    conversations, problems = read_conversations([path])
    assert conversations == [[Message("user", "a"), Message("assistant", "b")]]
    assert [problem.split(":")[1] for problem in problems] == ["2", "3", "4", "5", "6", "7"]


def test_unusable_files_are_one_sentence(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"missing\.jsonl does not exist"):
        read_conversations([tmp_path / "missing.jsonl"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no usable row"):
        read_conversations([tmp_path / "empty.jsonl"])
    with pytest.raises(DataError, match="every conversation is longer than sequence_length = 4"):
        encode_conversations(CHATS, tokenizer, 4)


def test_conversations_that_do_not_fit_are_counted_and_not_cut(tokenizer):
    lengths = [len(encode_conversation(chat, tokenizer)[0]) for chat in CHATS]
    examples, dropped = encode_conversations(CHATS, tokenizer, min(lengths))
    assert dropped == sum(n > min(lengths) for n in lengths)
    assert all(len(ids) == len(targets) <= min(lengths) for ids, targets in examples)

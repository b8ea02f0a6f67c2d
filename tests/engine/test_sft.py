import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny import write_jsonl

from redwhale.engine import load_recipe, run_recipe
from redwhale.engine.batches import IGNORE_INDEX, Batch, ExampleSequences
from redwhale.engine.chat_templates import SYSTEM, ChatTemplate, template_source
from redwhale.engine.conversations import Conversation, Message
from redwhale.engine.errors import DataError
from redwhale.engine.sft import encode_conversation, encode_conversations
from redwhale.model import Llama, ModelConfig
from redwhale.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2].parent / "shared/data"
STORIES, PAIRS = SHARED / "models/stories15m", SHARED / "sft/chatbot_ko.csv"

CHATS = [
    Conversation((Message("user", "안녕하세요?"), Message("assistant", "네, 안녕하세요.")), "a.jsonl", 1),
    Conversation(
        (
            Message("system", "You are terse."),
            Message("user", "One?"),
            Message("assistant", "1"),
            Message("user", "Two?"),
            Message("assistant", "2"),
        ),
        "a.jsonl",
        2,
    ),
    Conversation((Message("user", "two\nlines"), Message("assistant", "a\nb\n")), "a.jsonl", 3),
]


@pytest.fixture(scope="module")
def template(tiny_root):
    tokenizer = Tokenizer(tiny_root / "data" / "tokenizer.model")
    return ChatTemplate(template_source("redwhale", tokenizer), tokenizer)


def model_of(vocab_size: int) -> Llama:
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.requires_grad_(True)


def test_redwhales_template_is_the_papers_prompt(template):
    text = template.render([Message("user", "질문")], add_generation_prompt=True)
    assert text == f"<s>{SYSTEM}\nHuman: 질문\nAssistant:"


def test_targets_are_the_answers_and_their_ends_and_nothing_else(template):
    ids, targets = encode_conversation(CHATS[1].messages, template)
    predicted = [(i, t) for i, t in enumerate(targets) if t != IGNORE_INDEX]
    for i, target in predicted:
        assert ids[i + 1] == target
    tokenizer = template.tokenizer
    answers = [*tokenizer.encode("1"), tokenizer.eos_id, *tokenizer.encode("2"), tokenizer.eos_id]
    assert [target for _, target in predicted] == answers


@pytest.mark.parametrize("name", ["redwhale", "chatml", "llama-2"])
def test_no_prompt_token_contributes_gradient(template, name):
    """The gradient of packed conversations is that of the answers' log-probabilities, each conversation by itself."""
    tokenizer = template.tokenizer
    template = ChatTemplate(template_source(name, tokenizer), tokenizer)
    examples = [encode_conversation(chat.messages, template) for chat in CHATS]
    batch = Batch.collate([ExampleSequences(examples, 1024, 0).sequence(0)])
    assert len(batch.documents.lengths) == len(CHATS)  # packed into one sequence
    model = model_of(tokenizer.vocab_size)
    output = model.loss(batch.input_ids, batch.targets, batch.documents)
    output.loss_sum.backward()

    alone = model_of(tokenizer.vocab_size)
    total = torch.zeros(())
    for chat in CHATS:
        ids, counts = template.training_ids(chat.messages)
        tokens = torch.tensor(ids)
        one = Batch.collate([ExampleSequences([(ids, [IGNORE_INDEX] * len(ids))], 1024, 0).sequence(0)])
        log_p = torch.log_softmax(alone(tokens, one.documents), -1)
        for place, inside in enumerate(counts):
            if inside:
                total = total - log_p[place - 1, ids[place]]
    total.backward()
    torch.testing.assert_close(output.loss_sum, total, rtol=1e-5, atol=1e-5)
    for (key, ours), (_, theirs) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=key)


def test_a_masked_target_does_not_reach_the_loss(template):
    """Whatever the prompt's tokens would be predicted as, loss and gradient stay the same to the bit."""
    ids, targets = encode_conversation(CHATS[0].messages, template)
    batch = Batch.collate([ExampleSequences([(ids, targets)], 512, 0).sequence(0)])
    model = model_of(template.tokenizer.vocab_size)
    masked = batch.targets == IGNORE_INDEX
    output = model.loss(batch.input_ids, batch.targets, batch.documents)
    assert output.token_losses[masked].abs().max() == 0
    assert output.token_losses[~masked].min() > 0
    assert batch.num_targets == int((~masked).sum())


def test_packed_conversations_do_not_see_each_other(template):
    """The loss of one does not depend, in its value or its gradient, on what stands in the others."""
    examples = [encode_conversation(chat.messages, template) for chat in CHATS]
    sequence = ExampleSequences(examples, 1024, 0).sequence(0)
    batch = Batch.collate([sequence])
    model = model_of(template.tokenizer.vocab_size)
    starts = [0, *torch.tensor(batch.documents.lengths).cumsum(0).tolist()]
    first, last = slice(starts[1], starts[2]), batch.input_ids.clone()
    generator = torch.Generator().manual_seed(1)
    for start, end in ((0, starts[1]), (starts[2], starts[3])):
        last[start:end] = torch.randint(3, template.tokenizer.vocab_size, (end - start,), generator=generator)
    assert not torch.equal(last, batch.input_ids)
    losses = [model.loss(ids, batch.targets, batch.documents).token_losses[first] for ids in (batch.input_ids, last)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)

    # Rows of the embedding that only the other conversations use get no gradient at all from this one's loss.
    only_this = torch.full_like(batch.targets, IGNORE_INDEX)
    only_this[first] = batch.targets[first]
    model.loss(batch.input_ids, only_this, batch.documents).loss_sum.backward()
    others = set(batch.input_ids.tolist()) - set(batch.input_ids[first].tolist())
    gradient = model.model.embed_tokens.weight.grad
    assert others
    assert gradient[sorted(others)].abs().max() == 0
    assert gradient[batch.input_ids[first][:-1]].abs().sum(-1).min() > 0  # nothing is predicted from the last


def test_conversations_that_do_not_fit_are_listed_and_not_cut(template):
    lengths = [len(encode_conversation(chat.messages, template)[0]) for chat in CHATS]
    examples, too_long = encode_conversations(CHATS, template, min(lengths))
    assert [row.row for row in too_long] == [
        chat.row for chat, n in zip(CHATS, lengths, strict=True) if n > min(lengths)
    ]
    assert "more than sequence_length" in too_long[0].reason
    assert all(len(ids) == len(targets) <= min(lengths) for ids, targets in examples)
    with pytest.raises(DataError, match="every conversation is longer than sequence_length = 4"):
        encode_conversations(CHATS, template, 4)


def rows_of(recipe, name):
    path = recipe.run_dir / "sft" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sft_recipe(finished, tiny_root, tmp_path, *overrides):
    """The tiny recipe with its fine-tuning to be done again, in a folder of its own."""
    shutil.copytree(finished.run_dir, tmp_path / "tiny", ignore=shutil.ignore_patterns("sft", "eval", "export"))
    return load_recipe(tiny_root / "tiny.toml", [f"runs={tmp_path}", *overrides])


def test_the_step_lists_every_row_it_leaves_out(finished, tiny_root, tmp_path):
    rows = (tiny_root / "data" / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    long = {"instruction": "길게", "output": "가나다라 " * 400}
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{}", json.dumps(long)]), encoding="utf-8")
    recipe = sft_recipe(finished, tiny_root, tmp_path, f'sft.data=["{tmp_path}/rows.jsonl"]', "sft.template=chatml")
    (manifest,) = run_recipe(recipe, only="sft", say=lambda line: None)
    assert (manifest["summary"]["bad_rows"], manifest["summary"]["too_long"]) == (1, 1)
    listed = rows_of(recipe, "bad_rows.jsonl")
    assert [row["row"] for row in listed] == [len(rows) + 1, len(rows) + 2]
    assert "no messages" in listed[0]["reason"]
    assert "tokens, more than sequence_length = 256" in listed[1]["reason"]
    stored = json.loads((recipe.run_dir / "sft" / "model" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "<|im_start|>" in stored["chat_template"]
    assert manifest["after"] < manifest["before"]


@pytest.mark.parametrize("train", ['["layers.odd"]', '["all"]'])
def test_any_stage_fine_tunes(finished, tiny_root, tmp_path, train):
    overrides = [f"sft.train={train}", "sft.optimizer=adamw_8bit", "sft.lr=1e-3", "sft.schedule=constant"]
    (manifest,) = run_recipe(sft_recipe(finished, tiny_root, tmp_path, *overrides), only="sft", say=lambda line: None)
    assert manifest["after"] < manifest["before"]


def test_a_template_that_is_no_name_and_no_file_is_refused_before_any_work(finished, tiny_root, tmp_path):
    recipe = sft_recipe(finished, tiny_root, tmp_path, "sft.template=human")
    with pytest.raises(DataError, match="the chat template 'human' is none of redwhale, chatml, llama-2"):
        run_recipe(recipe, say=pytest.fail)


@pytest.mark.slow
@pytest.mark.skipif(
    not (STORIES.exists() and PAIRS.exists()), reason="the real model and pairs are not on this machine"
)
def test_fine_tuning_a_real_model_on_real_pairs_lowers_the_loss_on_held_out_answers(tmp_path):
    with PAIRS.open(encoding="utf-8", newline="") as file:
        rows = [{"instruction": row["Q"], "output": row["A"]} for row in csv.DictReader(file)][::50]
    write_jsonl(tmp_path / "train.jsonl", rows[:120])
    write_jsonl(tmp_path / "heldout.jsonl", rows[120:150])
    assert {row["instruction"] for row in rows[:120]}.isdisjoint(row["instruction"] for row in rows[120:150])
    (tmp_path / "tune.toml").write_text(
        f'runs = "{tmp_path}"\nprecision = "fp32"\n[base]\ncheckpoint = "{STORIES}"\n'
        f'[sft]\ndata = ["{tmp_path}/train.jsonl"]\nheldout = ["{tmp_path}/heldout.jsonl"]\n'
        'train = ["all"]\nsequence_length = 256\nbatch_size = 4\nlr = 1e-3\n[export]\n',
        encoding="utf-8",
    )
    tuned, exported = run_recipe(load_recipe(tmp_path / "tune.toml"), say=lambda line: None)
    assert tuned["summary"]["bad_rows"] == tuned["summary"]["too_long"] == 0
    assert tuned["after"] < 0.8 * tuned["before"]
    assert exported["summary"]["verification"]["same_chat"]  # with Llama-2's own tokenizer


def test_examples_of_one_conversation_are_the_same_whatever_is_packed_beside(template):
    draw = random.Random(0)
    chats = [
        Conversation((Message("user", "가" * draw.randint(1, 30)), Message("assistant", "나" * draw.randint(1, 30))))
        for _ in range(20)
    ]
    examples, _ = encode_conversations(chats, template, 512)
    source = ExampleSequences(examples, 512, 0)
    found = []
    for index in range(len(source)):
        sequence, start = source.sequence(index), 0
        for length in sequence.lengths:
            part = slice(start, start + length)
            found.append((sequence.input_ids[part].tolist(), sequence.targets[part].tolist()))
            start += length
    assert sorted(found) == sorted(examples)

"""Templates render, and conversations are tokenised, as transformers does both from the exported folder."""

import random
import unicodedata

import pytest
import sentencepiece.sentencepiece_model_pb2 as sentencepiece_model

from redwhale.engine.chat_templates import TEMPLATES, ChatTemplate, special_pieces, stored_template, template_source
from redwhale.engine.conversations import Message
from redwhale.engine.errors import DataError
from redwhale.tokenizer import Tokenizer, export_hf_tokenizer, load_model_proto

QUESTION = Message("user", "Next?")
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
    [Message("user", "  spaces  around  "), Message("assistant", "  and\there  ")],
    [Message("user", unicodedata.normalize("NFD", "한글 자모")), Message("assistant", "👩‍👩‍👧 ㅋㅋㅋ 漢字 Ａ１")],
    [Message("system", "규칙:\n1. 짧게"), Message("user", "\n\n"), Message("assistant", "▁")],
]


def write_model(source, folder, pieces=()) -> Tokenizer:
    """The tokenizer with more control pieces in place of its last ones, in a folder of its own."""
    proto = load_model_proto(source)
    for place, name in enumerate(pieces, len(proto.pieces) - len(pieces)):
        proto.pieces[place].piece = name
        proto.pieces[place].type = sentencepiece_model.ModelProto.SentencePiece.CONTROL
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module", params=[*TEMPLATES, "chatml with its pieces"])
def pair(request, tiny_root, tmp_path_factory):
    """(our template, transformers' tokenizer of the exported folder)."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = ["<|im_start|>", "<|im_end|>"] if "pieces" in request.param else []
    tokenizer = write_model(tiny_root / "data" / "tokenizer.model", folder, pieces)
    template = ChatTemplate(template_source(request.param.split()[0], tokenizer), tokenizer)
    export_hf_tokenizer(load_model_proto(tokenizer.path), folder, chat_template=template.source)
    assert stored_template(folder) == template.source
    return template, AutoTokenizer.from_pretrained(folder)


def raw(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


def random_chats(count):
    """Conversations of random characters that templates and tokenizers are known to trip over."""
    draw = random.Random(0)
    letters = [
        "가",
        "힣",
        "a",
        "Z",
        " ",
        "  ",
        "\n",
        "\t",
        "ㄱ",
        "é",
        "▁",
        "😀",
        "0",
        "[",
        "]",
        "<",
        ">",
        "|",
        ":",
        "s",
        "/",
    ]
    for _ in range(count):
        turns = draw.randint(1, 3)
        texts = ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(2 * turns + 1)]
        system = [Message("system", texts[-1])] * draw.randint(0, 1)
        roles = ["user", "assistant"] * turns
        yield [*system, *(Message(role, text) for role, text in zip(roles, texts, strict=False))]


def without_specials(messages, template):
    rendered = "".join(message.content for message in messages)
    return not any(piece in rendered for piece in special_pieces(template.tokenizer))


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_templates_render_and_tokenise_as_transformers_does(pair, messages):
    template, theirs = pair
    assert template.render(messages) == theirs.apply_chat_template(raw(messages), tokenize=False)
    assert template.training_ids(messages)[0] == theirs.apply_chat_template(raw(messages), return_dict=False)
    prompt = [*messages, QUESTION]
    asked = {"add_generation_prompt": True}
    rendered = theirs.apply_chat_template(raw(prompt), tokenize=False, **asked)
    assert template.render(prompt, add_generation_prompt=True) == rendered
    assert template.prompt_ids(prompt) == theirs.apply_chat_template(raw(prompt), return_dict=False, **asked)


def test_random_conversations_have_transformers_ids(pair):
    template, theirs = pair
    chats = [messages for messages in random_chats(300) if without_specials(messages, template)]
    assert len(chats) > 250
    for messages in chats:
        assert template.training_ids(messages)[0] == theirs.apply_chat_template(raw(messages), return_dict=False)


def test_the_answers_are_those_that_transformers_finds_by_generation_tags(pair):
    """`{% generation %}` marks what is written for an assistant; where the answer begins, the template decides."""
    template, theirs = pair
    marked = {
        "\\nAssistant: ' + message['content'] + eos_token }}": (
            "\\nAssistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
        ),
        "{{ ' ' + message['content'] | trim + ' ' + eos_token }}": (
            "{% generation %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}"
        ),
    }
    source = template.source
    for plain, tagged in marked.items():
        source = source.replace(plain, tagged)
    if source == template.source:  # ChatML
        end = "eos_token" if template.end_of_turn == template.tokenizer.eos_id else "'<|im_end|>'"
        source = (
            "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
            "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + " + end + " }}"
            "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        )
    for messages in [*CHATS, *random_chats(100)]:
        if not without_specials(messages, template):
            continue
        found = theirs.apply_chat_template(
            raw(messages), chat_template=source, return_assistant_tokens_mask=True, return_dict=True
        )
        ids, counts = template.training_ids(messages)
        assert found["input_ids"] == ids
        assert [bool(value) for value in found["assistant_masks"]] == counts


def test_every_answer_ends_in_the_token_that_ends_generation(pair):
    template, _ = pair
    ids, counts = template.training_ids(CHATS[1])
    ends = [i for i, (now, later) in enumerate(zip(counts, [*counts[1:], False], strict=True)) if now and not later]
    assert len(ends) == 2
    assert {ids[i] for i in ends} == {template.end_of_turn}
    assert template.end_of_turn in template.stop_ids
    assert template.tokenizer.eos_id in template.stop_ids


def test_generation_begins_where_training_had_the_answer(pair):
    template, _ = pair
    for messages in CHATS[:2]:
        ids, counts = template.training_ids(messages)
        last = max(i for i in range(1, len(ids)) if counts[i] and not counts[i - 1])
        assert template.prompt_ids(messages[:-1]) == ids[:last]


def test_special_tokens_in_messages_stay_text(pair):
    template, _ = pair
    tokenizer = template.tokenizer
    names = special_pieces(tokenizer)
    evil = "".join(f"</s>{name}<<s>s>" for name in names)
    plain = [Message("user", "x"), Message("assistant", "y")]
    messages = [Message("user", f"a{evil}b"), Message("assistant", f"c{evil}d")]
    ids, counts = template.training_ids(messages)

    def specials(found):
        return [i for i in found if i in names.values()]

    assert specials(ids) == specials(template.training_ids(plain)[0])
    assert tokenizer.decode(ids).count(f"a{evil}b") == 1
    answer = [i for i, inside in zip(ids, counts, strict=True) if inside]
    assert tokenizer.decode(answer).strip() == f"c{evil}d"
    assert specials(template.prompt_ids(messages[:1])) == specials(template.prompt_ids(plain[:1]))


def test_chatml_ends_answers_with_its_own_piece_where_the_tokenizer_has_it(tiny_root, tmp_path):
    source = tiny_root / "data" / "tokenizer.model"
    plain = Tokenizer(source)
    assert ChatTemplate(template_source("chatml", plain), plain).end_of_turn == plain.eos_id
    own = write_model(source, tmp_path, ["<|im_start|>", "<|im_end|>"])
    template = ChatTemplate(template_source("chatml", own), own)
    assert own.id_to_piece(template.end_of_turn) == "<|im_end|>"
    assert template.stop_ids == [template.end_of_turn, own.eos_id]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ raise_exception('no') }}", "refuses a conversation: no"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "ends answers without a special token"),
        ("{{ messages | length }}{{ eos_token }}", "changes what stands before an answer"),
        ("{{ ''.__class__.__mro__ }}", "refuses a conversation"),
    ],
)
def test_templates_that_cannot_be_used_are_one_sentence(tiny_root, source, message):
    with pytest.raises(DataError, match=message):
        ChatTemplate(source, Tokenizer(tiny_root / "data" / "tokenizer.model")).training_ids(CHATS[0])


def test_a_piece_across_the_border_of_prompt_and_answer_counts_as_the_prompts(tiny_root):
    tokenizer = Tokenizer(tiny_root / "data" / "tokenizer.model")
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    template = ChatTemplate(source, tokenizer)
    ids, counts = template.training_ids([Message("user", "in th"), Message("assistant", "e end")])
    assert ids == [tokenizer.bos_id, *tokenizer.encode("in the end"), tokenizer.eos_id]
    assert ids[: len(tokenizer.encode("in th")) + 1] != [tokenizer.bos_id, *tokenizer.encode("in th")]
    answer = [i for i, inside in zip(ids, counts, strict=True) if inside]
    assert tokenizer.decode(answer) == "end"


def test_a_template_that_cannot_be_trained_on_can_be_talked_to(tiny_root):
    tokenizer = Tokenizer(tiny_root / "data" / "tokenizer.model")
    template = ChatTemplate("{{ messages[-1]['content'] }}{{ eos_token }}", tokenizer)
    assert (template.end_of_turn, template.stop_ids) == (None, [tokenizer.eos_id])
    assert template.prompt_ids([QUESTION]) == [*tokenizer.encode("Next?"), tokenizer.eos_id]


def test_a_users_own_template_is_read_from_a_file(tiny_root, tmp_path):
    tokenizer = Tokenizer(tiny_root / "data" / "tokenizer.model")
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}\n"
        "{% if m.role == 'assistant' %}{% generation %}A {{ m.content }}{{ eos_token }}{% endgeneration %}\n"
        "{% else %}Q {{ m.content }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(template_source(str(path), tokenizer), tokenizer)
    assert template.render(CHATS[0]) == "<s>Q 안녕하세요?A 네, 안녕하세요.</s>"
    with pytest.raises(DataError, match="none of redwhale, chatml, llama-2, and no readable file"):
        template_source("chat-ml", tokenizer)

"""Streamed text is what decoding everything and cutting at the stop string gives; the command line prints it."""

import io
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from redwhale.engine.cli import main
from redwhale.engine.text_generation import StopFilter, TextStream, generate_text, generate_texts, prompt_ids
from redwhale.model import GenerationError, Llama, ModelConfig, generate, load_model, save_model
from redwhale.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
KOREAN = "한국어를 배우는 🐳 고래 👩‍👩‍👧 é ok"


def cut(text: str, stops: list[str]) -> str:
    """`text` before the stop string that is complete first, the longest of those complete at once."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@pytest.fixture(scope="module")
def checkpoint(tiny_root, tmp_path_factory):
    """A random model of 600 tokens, 256 of them bytes; read only."""
    folder = tmp_path_factory.mktemp("text") / "model"
    tokenizer = tiny_root / "data" / "tokenizer.model"
    config = ModelConfig(
        vocab_size=Tokenizer(tokenizer).vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(1))
    save_model(model, folder, extra_files=[tokenizer])
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer(checkpoint / "tokenizer.model")


# The stop strings


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["abc"], ["ab", "ab", "c", "d"], ["", "ab", "", ""]),
        (["abc"], ["a", "b", "d"], ["", "", "abd"]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
        (["abc"], ["abcd"], [""]),
        (["\n"], ["first\nsecond"], ["first"]),
        (["고래"], ["새우와 고", "래 싸움"], ["새우와 ", ""]),
        (["고래"], ["새우와 고", "등어"], ["새우와 ", "고등어"]),
        (["abcd", "bc"], ["abc", "d"], ["a", ""]),
        (["bc", "abc"], ["xabc"], ["x"]),
        (["Human:", "\nHuman:"], ["yes\nHu", "man: no"], ["yes", ""]),
    ],
)
def test_what_could_begin_a_stop_string_is_held_back_and_no_more(stops, pieces, expected):
    until_stop = StopFilter(stops)
    assert [until_stop.feed(piece) for piece in pieces] == expected


SMALL_TEXT = st.text("ab한", max_size=12)
STOPS = st.lists(st.text("ab한", min_size=1, max_size=4), max_size=3)


@given(st.lists(SMALL_TEXT, max_size=6), STOPS)
@example(["ab", "ab", "c"], ["abc"])
def test_the_filter_cuts_where_the_first_stop_string_is_complete(pieces, stops):
    until_stop = StopFilter(stops)
    text = passed = ""
    for piece in pieces:
        text += piece
        passed += until_stop.feed(piece)
        assert until_stop.stopped == any(stop in text for stop in stops)
        held = cut(text, stops)[len(passed) :]
        assert passed + held == cut(text, stops)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    assert passed + until_stop.flush() == cut(text, stops)


def test_an_empty_stop_string_is_refused(model, tokenizer):
    for call in (generate_text, lambda *a, **k: generate_texts(a[0], a[1], [a[2]], **k)):
        with pytest.raises(GenerationError, match="a stop string is empty"):
            call(model, tokenizer, "The", stop=["x", ""])


# Decoding while streaming


@pytest.mark.parametrize("text", [KOREAN, "ㅋㅋㅋ 안녕하세요?", "🏴󠁧󠁢󠁥󠁮󠁧󠁿🐳"])
def test_pieces_of_byte_fallback_text_are_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    assert sum(tokenizer.processor.is_byte(index) for index in ids) > 8
    pieces = list(TextStream(tokenizer).pieces(ids))
    assert "".join(pieces) == text
    assert len(pieces) > 4
    assert all(piece and REPLACEMENT not in piece for piece in pieces)


def test_a_stop_string_that_straddles_byte_tokens_is_found(tokenizer):
    ids = tokenizer.encode(KOREAN)
    for start in range(len(KOREAN)):
        for stop in (KOREAN[start : start + 1], KOREAN[start : start + 3]):
            expected = KOREAN[: KOREAN.find(stop)]
            assert "".join(TextStream(tokenizer, [stop]).pieces(ids)) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_the_stream_of_any_ids_is_the_whole_decode_cut(tokenizer, data):
    letters = [*tokenizer.encode("한🐳 ab."), *range(3, 259)]
    any_id = st.one_of(st.sampled_from(letters), st.integers(0, tokenizer.vocab_size - 1))
    ids = data.draw(st.lists(any_id, max_size=25))
    whole = tokenizer.decode(ids)
    parts = [whole[i : i + n] for i in range(len(whole)) for n in (1, 2, 5)]
    parts += [part + "☃" for part in parts] or ["x"]  # also what begins in the text and is not in it
    stops = data.draw(st.lists(st.sampled_from(parts), max_size=2))
    pieces = list(TextStream(tokenizer, stops).pieces(ids))
    assert "".join(pieces) == cut(whole, stops)
    if len(stops) == 1:
        assert "".join(pieces) == whole.split(stops[0])[0]
    if REPLACEMENT not in whole:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_what_is_held_back_at_the_end_of_the_text_comes_last(tokenizer):
    unfinished = [*tokenizer.encode("two or three"), *tokenizer.encode("한")[-3:-1]]  # two bytes of three
    for stop in ("three\ufffd\ufffd!", "or three.", "☃"):
        assert "".join(TextStream(tokenizer, [stop]).pieces(unfinished)) == "two or three\ufffd\ufffd"
    assert "".join(TextStream(tokenizer, ["three\ufffd\ufffd"]).pieces(unfinished)) == "two or "


def test_a_piece_comes_as_soon_as_it_is_certain_and_no_id_behind_a_stop_is_taken(tokenizer):
    ids = iter(tokenizer.encode("고래 is a whale and more"))
    pieces = TextStream(tokenizer, [" and"]).pieces(ids)
    assert next(pieces) == "고"
    taken = 3 + (tokenizer.encode("고")[0] == tokenizer.processor.piece_to_id("▁"))
    assert len(list(ids)) == len(tokenizer.encode("고래 is a whale and more")) - taken
    ids = iter(tokenizer.encode("one and more to come"))
    assert "".join(TextStream(tokenizer, [" and"]).pieces(ids)) == "one"
    assert tokenizer.decode(ids).endswith("to come")


# Generating


PROMPTS = ["The value of", "", KOREAN, "The"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_and_pieces_are_the_decode_of_all_ids(model, tokenizer, prompt):
    ids = prompt_ids(tokenizer, prompt)
    assert ids[0] == tokenizer.bos_id == 1
    new = list(generate(model, ids, max_new_tokens=30, stop_ids={tokenizer.eos_id}))
    pieces = list(generate_text(model, tokenizer, prompt, max_new_tokens=30))
    assert len(new) > 10
    assert prompt + "".join(pieces) == tokenizer.decode(ids + new)
    answer = "".join(generate_text(model, tokenizer, prompt, max_new_tokens=30, answer=True))
    assert answer == tokenizer.decode(new)


def test_texts_of_a_batch_are_those_generated_alone(model, tokenizer):
    options = {"max_new_tokens": 30, "repetition_penalty": 1.1}
    free = ["".join(generate_text(model, tokenizer, prompt, **options)) for prompt in PROMPTS]
    assert generate_texts(model, tokenizer, PROMPTS, **options) == free
    stops = [free[0][4:6], free[3][9:12]]
    expected = [cut(text, stops) for text in free]
    assert sum(map(len, expected)) < sum(map(len, free)) - 20
    assert ["".join(generate_text(model, tokenizer, p, stop=stops, **options)) for p in PROMPTS] == expected
    assert generate_texts(model, tokenizer, PROMPTS, stop=stops, **options) == expected
    sampled = generate_texts(model, tokenizer, PROMPTS[:1] * 3, temperature=1.0, seed=4)
    assert sampled[0] == "".join(generate_text(model, tokenizer, PROMPTS[0], temperature=1.0, seed=4))
    assert len(set(sampled)) == 3


def test_no_token_is_computed_behind_a_stop_string(model, tokenizer):
    free = "".join(generate_text(model, tokenizer, "The", max_new_tokens=40))
    passes = []
    handle = model.model.norm.register_forward_hook(lambda *_: passes.append(1))
    try:
        for run in (generate_text, lambda m, t, p, **options: generate_texts(m, t, [p], **options)):
            passes.clear()
            assert "".join(run(model, tokenizer, "The", max_new_tokens=40, stop=[free[3]])) == cut(free, [free[3]])
            assert len(passes) < 12
    finally:
        handle.remove()


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    other = Llama(ModelConfig(**{**_SHAPE, "vocab_size": 590}))
    for call in (generate_text, generate_texts):
        with pytest.raises(GenerationError, match=r"the checkpoint has 590 tokens, '.*' has 600; use the tokenizer"):
            call(other, tokenizer, "The")


def test_a_token_beyond_the_tokenizer_ends_the_text(model, tokenizer):
    """Padded vocabularies have rows without a piece; a model that chooses one has no more to say."""
    padded = Llama(ModelConfig(**{**vars(model.config), "vocab_size": 610}))
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat((state[name], torch.zeros(10, 32)))
    padded.load_state_dict(state)
    expected = "".join(generate_text(model, tokenizer, "The", max_new_tokens=20))
    assert "".join(generate_text(padded, tokenizer, "The", max_new_tokens=20)) == expected
    with torch.no_grad():  # in every state, some row beyond the tokenizer now has the highest logit
        padded.lm_head.weight[600:605] = 100 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        padded.lm_head.weight[605:] = -padded.lm_head.weight[600:605]
    assert "".join(generate_text(padded, tokenizer, "The", max_new_tokens=20)) == ""
    assert generate_texts(padded, tokenizer, ["The", "A"], max_new_tokens=20) == ["", ""]


_SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
}


# The command line


def run(capfd, *arguments: str) -> tuple[int, str, str]:
    code = main(["generate", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture
def standard_input(monkeypatch):
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


def test_several_prompts_are_printed_one_after_another(capfd, checkpoint, model, tokenizer):
    prompts = ["The value of", KOREAN]
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens=10)
    code, out, _ = run(capfd, checkpoint, *prompts, "--max-new-tokens", 10)
    assert code == 0
    assert out == "\n---\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)) + "\n"


def test_every_option_reaches_the_text(capfd, checkpoint, model, tokenizer):
    free = "".join(generate_text(model, tokenizer, "The", temperature=0.9, top_p=0.9, repetition_penalty=1.3, seed=5))
    options = ["--temperature", 0.9, "--top-p", 0.9, "--repetition-penalty", 1.3, "--seed", 5]
    assert run(capfd, checkpoint, "The", *options)[1] == f"The{free}\n"
    stops = [free[20:22], free[9:11]]
    code, out, _ = run(capfd, checkpoint, "The", *options, "--stop", stops[0], "--stop", stops[1])
    assert (code, out) == (0, f"The{cut(free, stops)}\n")
    assert len(cut(free, stops)) <= 9


def test_the_weights_can_be_converted(capfd, checkpoint, tokenizer):
    texts = {}
    for precision, dtype in (("auto", None), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = load_model(checkpoint, dtype=dtype)
        texts[precision] = "The" + "".join(generate_text(model, tokenizer, "The", max_new_tokens=60))
        code, out, _ = run(capfd, checkpoint, "The", "--max-new-tokens", 60, "--precision", precision)
        assert (code, out) == (0, texts[precision] + "\n")
    assert texts["auto"] == texts["fp32"] != texts["bf16"]


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_a_prompt_can_come_from_standard_input(capfd, standard_input, checkpoint, ending):
    prompt = f"{KOREAN}\n둘째 줄"
    expected = run(capfd, checkpoint, prompt, "--max-new-tokens", 5)
    standard_input(prompt.encode() + ending)
    assert run(capfd, checkpoint, "-", "--max-new-tokens", 5) == expected


def test_a_terminal_of_another_encoding_shows_what_it_can(checkpoint):
    result = subprocess.run(
        [sys.executable, "-m", "redwhale.engine.cli", "generate", str(checkpoint), KOREAN, "--max-new-tokens", "1"],
        env={**os.environ, "PYTHONIOENCODING": "euc-kr"},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode("euc-kr").startswith("한국어를 배우는 ? 고래")


def test_what_a_user_gets_wrong_ends_in_one_sentence(capfd, standard_input, checkpoint, tmp_path):
    standard_input("안녕".encode("euc-kr"))
    without = tmp_path / "without"
    shutil.copytree(checkpoint, without)
    (without / "tokenizer.model").unlink()
    other = tmp_path / "other"
    save_model(Llama(ModelConfig(**{**_SHAPE, "vocab_size": 590})), other, extra_files=[checkpoint / "tokenizer.model"])
    cases = {
        (checkpoint, "The", "--temperature", -1): "temperature is -1.0; it must be at least 0 (greedy) and finite",
        (checkpoint, "The", "--top-p", 0): "top_p is 0.0; it must be above 0",
        (checkpoint, "The", "--repetition-penalty", 0): "repetition_penalty is 0.0; it must be above 0",
        (checkpoint, "The", "--max-new-tokens", -3): "max_new_tokens is -3; it must be at least 0",
        (checkpoint, "The", "--stop", ""): "a stop string is empty",
        (checkpoint, "-"): "standard input is not UTF-8 text",
        (checkpoint, "-", "-"): "- stands for standard input, which can be read once",
        (checkpoint, "a " * 300): "the model's context only 128",
        (checkpoint, "한\udcff"): "lone surrogate",
        (without, "The"): f"{without} has no tokenizer.model",
        (tmp_path / "absent", "The"): "is not a checkpoint folder",
        (other, "The"): "the checkpoint has 590 tokens",
    }
    for arguments, message in cases.items():
        code, out, err = run(capfd, *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("redwhale: "), arguments
        assert err.count("\n") == 1, err
        assert message in err

"""Talking to a fine-tuned checkpoint: from Python, in the terminal, and over the OpenAI API with its own client."""

import io
import signal
import socket
import subprocess
import sys
import threading
import time

import msgspec
import pytest
import torch
import uvicorn
from openai import APIError, BadRequestError, NotFoundError, OpenAI

from redwhale.engine.chat import ChatModel, Sampling
from redwhale.engine.chat_commands import HELP, chat
from redwhale.engine.cli import main
from redwhale.engine.conversations import Message
from redwhale.engine.errors import RecipeError
from redwhale.engine.serving import create_app
from redwhale.model import generate

ASK = [{"role": "user", "content": "첫 낱말은?"}]
MESSAGES = [Message("user", "첫 낱말은?")]
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def model(finished) -> ChatModel:
    return ChatModel.load(finished.run_dir / "export" / "model")


def greedy_text(model: ChatModel, ids: list[int], limit: int) -> str:
    """What the model says behind some ids, without any of the code of chat."""
    stops = [*model.template.stop_ids, *range(model.tokenizer.vocab_size, model.model.config.vocab_size)]
    return model.tokenizer.decode(list(generate(model.model, ids, max_new_tokens=limit, stop_ids=stops)))


def test_an_answer_is_what_the_model_generates_behind_the_rendered_conversation(model):
    answer = model.answer(MESSAGES, GREEDY)
    text = "".join(answer)
    ids = model.template.prompt_ids(MESSAGES)
    assert text == greedy_text(model, ids, 12)
    assert text
    assert answer.prompt_tokens == len(ids)
    assert 0 < answer.completion_tokens <= 12
    assert answer.finish_reason == ("length" if answer.completion_tokens == 12 else "stop")


def test_an_answer_tells_why_it_ended(model):
    full = "".join(model.answer(MESSAGES, GREEDY))
    short = model.answer(MESSAGES, Sampling(max_new_tokens=2))
    assert full.startswith("".join(short))
    assert (short.finish_reason, short.completion_tokens) == ("length", 2)
    long = Sampling(max_new_tokens=40, temperature=1.5, seed=3)
    text = "".join(model.answer(MESSAGES, long))
    assert len(text) > 10
    stopped = model.answer(MESSAGES, msgspec.structs.replace(long, stop=(text[8:10],)))
    assert "".join(stopped) == text[: text.index(text[8:10])]
    assert stopped.finish_reason == "stop"
    room = model.model.config.context_length - len(model.template.prompt_ids(MESSAGES)) + 1
    endless = model.continue_ids(model.template.prompt_ids(MESSAGES), Sampling(max_new_tokens=10_000))
    assert sum(1 for _ in endless) >= 0
    assert endless.finish_reason == ("length" if endless.completion_tokens == room else "stop")


def test_the_oldest_turns_make_room(model):
    turns = [Message("system", "규칙")]
    for number in range(200):
        turns += [Message("user", f"질문 {number}"), Message("assistant", "답")]
    turns.append(Message("user", "마지막"))
    kept = model.fitting(turns, room=16)
    assert kept[0] == turns[0]
    assert kept[1].role == "user"
    assert kept[1:] == turns[-len(kept) + 1 :]
    length = len(model.template.prompt_ids(kept))
    context = model.model.config.context_length
    assert length + 16 <= context < len(model.template.prompt_ids([turns[0], *turns[-len(kept) - 1 :]])) + 16


def test_a_conversation_in_the_terminal(model):
    said: list[str] = []
    notes: list[str] = []
    lines = iter(["첫 낱말은?\n", "\n", "그 다음은?\n", "/help\n", "/new\n", "첫 낱말은?\n", "/exit\n", "not read\n"])
    chat(model, GREEDY, lines=lines, say=said.append, note=notes.append)
    answers = "".join(said).splitlines()
    first = "".join(model.answer(MESSAGES, GREEDY))
    second = [*MESSAGES, Message("assistant", first), Message("user", "그 다음은?")]
    assert answers == [first, "".join(model.answer(second, GREEDY)), first]
    assert notes == [HELP]
    assert list(lines) == ["not read\n"]


def test_system_instructions_begin_the_conversation(model):
    said: list[str] = []
    chat(model, GREEDY, lines=iter(["/system 짧게", "첫 낱말은?"]), say=said.append, note=pytest.fail)
    expected = "".join(model.answer([Message("system", "짧게"), *MESSAGES], GREEDY))
    assert "".join(said) == f"{expected}\n"


def test_the_command_answers_the_lines_of_a_pipe(finished, model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("첫 낱말은?\n"))
    folder = finished.run_dir / "export" / "model"
    assert main(["chat", str(folder), "--temperature", "0", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == "".join(model.answer(MESSAGES, GREEDY)) + "\n"


def test_generates_chat_option_uses_the_checkpoints_template(finished, model, capsys):
    folder = finished.run_dir / "sft" / "model"
    assert main(["generate", str(folder), "첫 낱말은?", "--chat", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == "".join(model.answer(MESSAGES, GREEDY)) + "\n"


def test_a_checkpoint_without_a_template_needs_one(finished, capsys):
    folder = finished.run_dir / "init" / "model"
    with pytest.raises(RecipeError, match="carries no chat template"):
        ChatModel.load(folder)
    assert main(["serve", str(folder)]) == 2
    assert "carries no chat template" in capsys.readouterr().err
    assert ChatModel.load(folder, template="chatml").template.source.startswith("{{ bos_token }}")


# The endpoint.


def test_a_port_that_is_taken_is_one_sentence(finished, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(finished.run_dir / "export" / "model"), "--port", str(port)]) == 2
    assert f"cannot listen on port {port} of 127.0.0.1" in capsys.readouterr().err


def test_the_command_serves_until_it_is_interrupted(finished):
    command = [sys.executable, "-m", "redwhale.engine.cli", "serve", str(finished.run_dir / "export" / "model")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([*command, "--port", str(port), "--name", "toy"], stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(60, server.kill)
    timer.start()
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == f"toy answers on http://127.0.0.1:{port}/v1 (Ctrl-C ends it)\n"
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=30)
        assert [entry.id for entry in client.models.list()] == ["toy"]
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    timer.cancel()


@pytest.fixture(scope="module")
def client(model):
    server = uvicorn.Server(uvicorn.Config(create_app(model), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def test_the_endpoint_lists_its_model(client):
    assert [entry.id for entry in client.models.list()] == ["model"]
    assert client.models.retrieve("model").owned_by == "redwhale"
    with pytest.raises(NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_openais_client_gets_the_answer_whole(client, model):
    done = client.chat.completions.create(model="model", messages=ASK, temperature=0, max_tokens=12)
    answer = model.answer(MESSAGES, GREEDY)
    assert done.choices[0].message.content == "".join(answer)
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == answer.finish_reason
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (answer.prompt_tokens, answer.completion_tokens)


def test_openais_client_gets_the_answer_streamed(client, model):
    stream = client.chat.completions.create(
        model="model",
        messages=ASK,
        temperature=0,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    answer = model.answer(MESSAGES, GREEDY)
    pieces = list(answer)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks[1:-2]] == pieces
    assert len(pieces) > 1
    assert chunks[-2].choices[0].finish_reason == answer.finish_reason
    assert chunks[-1].usage.completion_tokens == answer.completion_tokens


def test_text_completions_whole_streamed_and_several(client, model):
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("대한민국")]
    expected = "".join(model.continue_ids(ids, Sampling(max_new_tokens=6)))
    settings = {"model": "model", "temperature": 0, "max_tokens": 6}
    assert client.completions.create(prompt="대한민국", **settings).choices[0].text == expected
    assert client.completions.create(prompt=ids, **settings).choices[0].text == expected
    streamed = client.completions.create(prompt="대한민국", stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected
    both = client.completions.create(prompt=["대한민국", "A"], **settings)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == expected


def test_sampling_settings_reach_the_model(client, model):
    settings = {"model": "model", "messages": ASK, "temperature": 1.5, "top_p": 0.9, "max_tokens": 12}
    texts = {seed: client.chat.completions.create(seed=seed, **settings).choices[0].message.content for seed in (1, 2)}
    again = client.chat.completions.create(seed=1, **settings).choices[0].message.content
    assert again == texts[1] != texts[2]
    expected = model.answer(MESSAGES, Sampling(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=1))
    assert texts[1] == "".join(expected)
    stop = texts[1][4:6]
    assert len(stop) == 2
    cut = client.chat.completions.create(seed=1, stop=[stop], **settings).choices[0]
    assert (cut.message.content, cut.finish_reason) == (texts[1][: texts[1].index(stop)], "stop")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"messages": []}, "must end with one of the user"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "role 'tool'"),
        ({"n": 2}, "n must be 1"),
        ({"temperature": -1}, "temperature"),
        ({"messages": [{"role": "user", "content": "가" * 10_000}]}, "the model's context only"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"max_tokens": "many"}, "Expected `int"),
        ({"stop": [""]}, "stop string is empty"),
        ({"messages": [{"role": "user", "content": "x"}], "stream": True, "top_p": 7}, "top_p"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_with_a_reason(client, request_, message):
    with pytest.raises(BadRequestError, match=message):
        client.chat.completions.create(**{"model": "model", "messages": ASK, **request_})


def test_parts_of_text_and_neutral_settings_are_taken(client, model):
    parts = [
        {"role": "developer", "content": "짧게"},
        {"role": "user", "content": [{"type": "text", "text": "첫 낱말은?"}]},
    ]
    done = client.chat.completions.create(
        model="whatever", messages=parts, temperature=0, max_tokens=6, presence_penalty=0, logprobs=False, n=1
    )
    expected = model.answer([Message("system", "짧게"), *MESSAGES], Sampling(max_new_tokens=6))
    assert done.choices[0].message.content == "".join(expected)


def test_a_client_that_goes_away_frees_the_model(client):
    stream = client.chat.completions.create(model="model", messages=ASK, stream=True, max_tokens=200)
    next(iter(stream))
    stream.close()
    done = client.chat.completions.create(model="model", messages=ASK, temperature=0, max_tokens=2)
    assert done.usage.completion_tokens == 2


def test_several_clients_are_answered_in_turn(client, model):
    expected = "".join(model.answer(MESSAGES, GREEDY))
    found: list[str | None] = []

    def ask():
        done = client.chat.completions.create(model="model", messages=ASK, temperature=0, max_tokens=12)
        found.append(done.choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 4


def test_damaged_weights_end_a_stream_with_an_error(client, model):
    weight = model.model.model.norm.weight
    before = weight.clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        stream = client.chat.completions.create(model="model", messages=ASK, stream=True)
        with pytest.raises(APIError, match="not finite"):
            list(stream)
    finally:
        with torch.no_grad():
            weight.copy_(before)

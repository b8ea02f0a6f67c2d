"""`redwhale serve`: the OpenAI API for one checkpoint, for trying it out with the tools that speak it.

One answer is generated at a time, and others wait for their turn: this is no server for production. Requests and
answers are those of the API's public reference; fields that would change the answer, and that this server does not
have, are refused, and others are ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .chat import Answer, ChatModel, Sampling
from .conversations import Message
from .errors import USER_ERRORS, RunError
from .text_generation import prompt_ids

_UNSUPPORTED = (
    *("tools", "functions", "response_format", "logprobs", "top_logprobs", "logit_bias", "audio", "echo", "suffix"),
    *("presence_penalty", "frequency_penalty"),
)
"""Fields that would change the answer; their neutral values (null, 0, false, empty, text) are taken."""


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Request(msgspec.Struct, kw_only=True):
    """What both kinds of requests have."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    n: int | None = 1


class _Part(msgspec.Struct):
    type: str
    text: str = ""


class _ChatMessage(msgspec.Struct):
    role: str
    content: str | list[_Part]


class _ChatRequest(_Request, kw_only=True):
    messages: list[_ChatMessage]
    max_completion_tokens: int | None = None


class _TextRequest(_Request, kw_only=True):
    prompt: str | list[str | int]


_Kind = TypeVar("_Kind", bound=_Request)


class _BadRequest(ValueError):
    """What a client has to mend."""


def create_app(chat: ChatModel, *, defaults: Sampling | None = None) -> Starlette:
    """The API as an ASGI application, to be run by uvicorn or mounted in another one.

    Args:
        chat: who answers.
        defaults: what counts where a request says nothing; without it temperature 1, as in the API's reference, and
            text up to the end of the context.
    """
    defaults = defaults or Sampling(temperature=1.0, max_new_tokens=chat.model.config.context_length)
    created = int(time.time())
    turn = asyncio.Lock()
    card = {"id": chat.name, "object": "model", "created": created, "owned_by": "redwhale"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != chat.name:
            return _error(f"there is no model {request.path_params['name']!r}; this one is {chat.name!r}", 404)
        return JSONResponse(card)

    async def chat_completions(request: Request) -> Response:
        asked = await _decode(request, _ChatRequest)
        messages = [_message(message) for message in asked.messages]
        if not messages or messages[-1].role != "user":
            raise _BadRequest("messages must end with one of the user")
        sampling = _sampling(asked, defaults, asked.max_completion_tokens)
        answer = chat.answer(messages, sampling)
        shape = _ChatShape(chat.name)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_events(answer, shape, turn, usage), media_type="text/event-stream")
        return JSONResponse(shape.whole([(await _all(answer, turn), answer)]))

    async def completions(request: Request) -> Response:
        asked = await _decode(request, _TextRequest)
        sampling = _sampling(asked, defaults, None, usual=16)
        answers = [chat.continue_ids(ids, sampling) for ids in _prompts(asked.prompt, chat)]
        shape = _TextShape(chat.name)
        if asked.stream:
            if len(answers) > 1:
                raise _BadRequest("stream one prompt at a time")
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_events(answers[0], shape, turn, usage), media_type="text/event-stream")
        return JSONResponse(shape.whole([(await _all(answer, turn), answer) for answer in answers]))

    async def refuse(request: Request, error: Exception) -> Response:
        return _error(str(error), 400)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/health", lambda request: JSONResponse({"status": "ok"})),
        ],
        exception_handlers=dict.fromkeys((_BadRequest, *USER_ERRORS), refuse),
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that has the port; raises RunError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # who connects before the server runs waits
    except (OSError, OverflowError) as error:
        raise RunError(
            f"cannot listen on port {port} of {host} ({error}): choose others with --host and --port"
        ) from None
    return bound


def serve(chat: ChatModel, listening: socket.socket, *, defaults: Sampling | None = None) -> None:
    """Answer requests that come to a socket of `listen` until interrupted."""
    config = uvicorn.Config(create_app(chat, defaults=defaults), log_level="info", lifespan="off")
    server = uvicorn.Server(config)
    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(f"{chat.name} answers on http://{address}:{port}/v1 (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
        server.run(sockets=[listening])


async def _decode(request: Request, kind: type[_Kind]) -> _Kind:
    try:
        raw = msgspec.json.decode(await request.body())
        asked = msgspec.convert(raw, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _BadRequest(f"the request cannot be understood: {error}") from None
    if asked.n not in (None, 1):
        raise _BadRequest("n must be 1: one answer is generated at a time")
    neutral = (None, 0, False, "", [], {}, {"type": "text"})
    if refused := [name for name in _UNSUPPORTED if raw.get(name) not in neutral]:
        raise _BadRequest(f"{refused[0]} is not supported by this server")
    return asked


def _message(message: _ChatMessage) -> Message:
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant"):
        raise _BadRequest(f"the role {role!r} is none of system, user and assistant")
    if isinstance(message.content, str):
        return Message(role, message.content)
    if other := [part.type for part in message.content if part.type != "text"]:
        raise _BadRequest(f"content of type {other[0]!r} is not supported: the model reads text")
    return Message(role, "".join(part.text for part in message.content))


def _sampling(asked: _Request, defaults: Sampling, limit: int | None, usual: int | None = None) -> Sampling:
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    given = {
        "max_new_tokens": asked.max_tokens if limit is None else limit,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "repetition_penalty": asked.repetition_penalty,
        # Not the same answer to the same question each time, unless that is asked for.
        "seed": uuid.uuid4().int % 2**31 if asked.seed is None else asked.seed,
        "stop": stop or None,
    }
    if given["max_new_tokens"] is None:
        given["max_new_tokens"] = usual
    return msgspec.structs.replace(defaults, **{key: value for key, value in given.items() if value is not None})


def _prompts(prompt: str | list[str | int], chat: ChatModel) -> list[list[int]]:
    if isinstance(prompt, str):
        return [prompt_ids(chat.tokenizer, prompt)]
    texts = [entry for entry in prompt if isinstance(entry, str)]
    ids = [entry for entry in prompt if isinstance(entry, int)]
    if not prompt or (texts and ids):
        raise _BadRequest("prompt must be a text, a list of texts, or the token ids of one")
    return [prompt_ids(chat.tokenizer, text) for text in texts] or [ids]


class _Shape:
    """How answers look in JSON."""

    id_prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str) -> None:
        self._id, self._model, self._created = f"{self.id_prefix}-{uuid.uuid4().hex}", model, int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }

    def whole(self, answers: list[tuple[str, Answer]]) -> dict[str, Any]:
        """All at once."""
        choices = [
            {"index": index, **self.full(text), "logprobs": None, "finish_reason": answer.finish_reason}
            for index, (text, answer) in enumerate(answers)
        ]
        return self._object(self.kind, choices, usage=_usage([answer for _, answer in answers]))

    def chunk(self, text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of a stream; None for the one that opens or ends it."""
        choice = {"index": 0, **self.piece(text, finish_reason), "logprobs": None, "finish_reason": finish_reason}
        return self._object(self.chunk_kind, [choice])

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """The last piece of a stream that tells its tokens."""
        return self._object(self.chunk_kind, [], usage=_usage([answer]))

    def full(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def piece(self, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        raise NotImplementedError


class _ChatShape(_Shape):
    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def full(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def piece(self, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        if text is not None:
            return {"delta": {"content": text}}
        return {"delta": {}} if finish_reason else {"delta": {"role": "assistant", "content": ""}}


class _TextShape(_Shape):
    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def full(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def piece(self, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        return {"text": text or ""}


async def _pieces(answer: Answer, turn: asyncio.Lock) -> AsyncIterator[str]:
    """The pieces of an answer, generated off the event loop; a client that goes away ends it."""
    async with turn:
        pieces = iter(answer)
        while (piece := await run_in_threadpool(next, pieces, None)) is not None:
            yield piece


async def _all(answer: Answer, turn: asyncio.Lock) -> str:
    return "".join([piece async for piece in _pieces(answer, turn)])


async def _events(answer: Answer, shape: _Shape, turn: asyncio.Lock, include_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events of a streamed answer."""
    encode: Callable[[Any], bytes] = lambda value: b"data: " + msgspec.json.encode(value) + b"\n\n"  # noqa: E731
    yield encode(shape.chunk(None))
    try:
        async for piece in _pieces(answer, turn):
            yield encode(shape.chunk(piece))
    except USER_ERRORS as error:  # the status has been sent
        yield encode({"error": _described(str(error))})
        return
    yield encode(shape.chunk(None, answer.finish_reason))
    if include_usage:
        yield encode(shape.usage_chunk(answer))
    yield b"data: [DONE]\n\n"


def _usage(answers: list[Answer]) -> dict[str, int]:
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _described(message: str) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "param": None, "code": None}


def _error(message: str, status: int) -> Response:
    return JSONResponse({"error": _described(message)}, status_code=status)

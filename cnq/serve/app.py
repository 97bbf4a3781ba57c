"""The routes: OpenAI's requests to a model in slots, and what keeps strangers out."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..answer import Ask, End, Piece, answer
from ..chat import Style, prompt_tokens
from ..engine.model import Model, Sampling
from ..errors import CnqError, EngineError, Interrupted, PromptError
from ..slots import Busy, Embedders, Put, Slots, Stopping, Turn
from .protocol import ApiError, ChatRequest, CompletionRequest, EmbeddingRequest, parsed
from .protocol import Request as Wanted
from .replies import ChatReply, CompletionReply, Reply, embeddings

MAX_BODY = 4 << 20  # bytes; more than any context holds
_DRAINED = 4 * MAX_BODY  # read and thrown away of a larger one, so that the client gets to read the refusal
_PATIENCE = 15  # seconds between signs of life while a prompt waits or is read: proxies give up on a silent connection

_T = TypeVar("_T")


@dataclass(frozen=True)
class Access:
    """Who may ask. key: None = everybody. hosts: names that requests may call this server by; None = any.

    Without a key, only the names of this machine's loopback are allowed: else a page in the user's browser could have its own
    name resolved to 127.0.0.1 and read the answers; and only pages of this machine may ask at all. origins: of other pages that
    may ask and read the answers; * = any.
    """

    key: str | None = None
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()


def make_app(slots: Slots, embedders: Embedders, style: Style, model: str, created: int, access: Access) -> Starlette:
    """model: what it is called. created: seconds since 1970."""
    api = _Api(slots, embedders, style, model, created)
    middleware = [Middleware(Guard, access=access)]
    if access.origins:
        allowed = {"allow_origins": access.origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        middleware.insert(0, Middleware(CORSMiddleware, **allowed))  # type: ignore[arg-type]
    return Starlette(
        routes=[
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.one_model),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completion, methods=["POST"]),
            Route("/v1/embeddings", api.embedding, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={CnqError: _refused, HTTPException: _refused, ClientDisconnect: _nobody, Exception: _our_bug},
    )


class Guard:
    """Middleware that lets in whom Access allows."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._objection(scope["path"], Headers(scope=scope))):
            await _response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _objection(self, path: str, headers: Headers) -> ApiError | None:
        hosts, origin = self._access.hosts, headers.get("origin")
        if hosts is not None and _host(f"//{headers.get('host', '')}") not in hosts:
            return ApiError(403, "without an API key this server answers to the names of its own machine only.",
                            code="wrong_host")  # fmt: skip
        known = origin is None or origin in self._access.origins or "*" in self._access.origins
        if hosts is not None and not known and _host(origin or "") not in hosts:
            return ApiError(
                403, f"without an API key this server answers no page of {origin}; see --cors.", code="wrong_origin"
            )
        if self._access.key is None or path == "/health":
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self._access.key.encode())
        if right and scheme.lower() == "bearer":
            return None
        return ApiError(401, "wrong API key." if key else "this server wants an API key: Authorization: Bearer KEY.",
                        code="invalid_api_key")  # fmt: skip


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


class _Api:
    def __init__(self, slots: Slots, embedders: Embedders, style: Style, name: str, created: int):
        self._slots, self._embedders, self._style, self._name = slots, embedders, style, name
        self._model = slots.model  # for its vocabulary alone
        self._described = {"id": name, "object": "model", "created": created, "owned_by": "cnq"}
        self._longest = max(len(str(token).encode()) for token in self._model.fields["tokenizer.ggml.tokens"])

    async def health(self, request: Request) -> Response:
        s = self._slots
        return JSONResponse({"status": "ok", "model": self._name, "n_ctx": self._model.n_ctx, "slots": s.n_slots,
                             "running": s.n_running, "queue": s.n_queue, "waiting": s.n_waiting})  # fmt: skip

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described]})

    async def one_model(self, request: Request) -> Response:
        self._require(request.path_params["name"])
        return JSONResponse(self._described)

    async def chat(self, request: Request) -> Response:
        wanted = parsed(ChatRequest, await _body(request))
        self._require(wanted.model)
        self._slots.require_place()
        messages = [message.plain() for message in wanted.messages]
        self._require_short(sum(len(m["content"].encode()) for m in messages), "bytes", "messages")
        prompt = await asyncio.to_thread(prompt_tokens, self._model, self._style, messages)
        self._require_short(len(prompt), "tokens", "messages")
        ask = Ask(
            prompt,
            await self._sampling(wanted),
            wanted.max_completion_tokens or wanted.max_tokens or self._model.n_ctx,
            stop=(*self._style.stop, *wanted.stops),
            end=self._style.end,
            logprobs=wanted.scores,
            lstrip=True,
        )
        return await self._answered(request, wanted, ask, ChatReply)

    async def completion(self, request: Request) -> Response:
        wanted = parsed(CompletionRequest, await _body(request))
        self._require(wanted.model)
        self._slots.require_place()
        prompt = await self._tokens(wanted.text, "prompt")
        limit = wanted.max_tokens or self._model.n_ctx
        ask = Ask(prompt, await self._sampling(wanted), limit, stop=wanted.stops, logprobs=wanted.logprobs)
        return await self._answered(request, wanted, ask, CompletionReply)

    async def embedding(self, request: Request) -> Response:
        wanted = parsed(EmbeddingRequest, await _body(request))
        self._require(wanted.model)

        async def vectors() -> Response:
            texts = [await self._tokens(text, "input") for text in wanted.texts]
            found = [await self._embedders.vector(tokens) for tokens in texts]
            return JSONResponse(embeddings(self._name, found, sum(map(len, texts)), wanted.encoding_format))

        return await _unless_gone(request, vectors())

    def _require(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise ApiError(404, f"there is no model {name[:200]!r} here; {self._name!r} is served.", code="model_not_found",
                           param="model")  # fmt: skip

    def _require_short(self, size: int, unit: str, param: str) -> None:
        """Refuse what does not fit into the context. unit: tokens, or bytes, before tokens are made of them.

        In bytes only what cannot fit however it is cut is refused; to make tokens of a megabyte takes seconds, or minutes.
        """
        n_ctx = self._model.n_ctx
        if size >= (n_ctx if unit == "tokens" else self._longest * n_ctx):
            told = f"this model's context is {n_ctx} tokens, and the prompt alone has {size} {unit}. Shorten it."
            raise ApiError(400, told, code="context_length_exceeded", param=param)

    async def _tokens(self, text: str | list[int], param: str) -> list[int]:
        """Of a text that is no chat: with bos in front, once, and special tokens read as such."""
        model = self._model
        if isinstance(text, list):
            if wrong := [token for token in text if not 0 <= token < model.n_vocab]:
                raise ApiError(400, f"there is no token {wrong[0]}.", code="invalid_value", param=param)
            tokens = text
        else:
            self._require_short(len(text.encode("utf-8", "surrogatepass")), "bytes", param)
            text = text.removeprefix(model.token_text("bos")) if model.adds_bos else text
            tokens = await asyncio.to_thread(model.tokenize, text, add_special=True, parse_special=True)
        if not tokens:
            raise ApiError(400, "there is no text.", code="invalid_value", param=param)
        self._require_short(len(tokens), "tokens", param)
        return tokens

    async def _sampling(self, wanted: Wanted) -> Sampling:
        try:
            sampling = await asyncio.to_thread(wanted.sampling, self._style.sampling, self._model.n_vocab)
            await asyncio.to_thread(self._model.check, sampling)
        except EngineError as error:
            raise ApiError(400, str(error), code="invalid_value", param="response_format") from error
        return sampling

    async def _answered(self, request: Request, wanted: Wanted, ask: Ask, kind: type[Reply]) -> Response:
        usage = wanted.stream_options.include_usage
        reply = kind(self._name, len(ask.prompt), self._model.piece, usage=usage)

        def work(model: Model, put: Put) -> None:
            for part in answer(model, ask, self._slots.threads):
                put(part)

        turn = self._slots.start(work, ask.prompt)
        if wanted.stream:
            return _Events(turn, reply)
        try:
            return await _unless_gone(request, _whole(turn, reply))
        finally:
            turn.close()


async def _whole(turn: Turn, reply: Reply) -> Response:
    *pieces, end = [part async for part in turn]
    return JSONResponse(reply.whole(pieces, end))


class _Events(StreamingResponse):
    """The pieces of an answer as server-sent events, as they come."""

    def __init__(self, turn: Turn, reply: Reply):
        self._turn = turn
        super().__init__(_events(turn, reply), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._turn.close()  # also when the client was gone before the first event


async def _events(turn: Turn, reply: Reply) -> AsyncIterator[str]:
    for chunk in reply.chunks_before():
        yield _event(chunk)
    try:
        async for part in _patiently(turn):
            match part:
                case Piece():
                    yield _event(reply.chunk(part))
                case End():
                    for chunk in reply.chunks_after(part):
                        yield _event(chunk)
                case None:
                    yield ": still working\n\n"
    except CnqError as error:
        yield _event(_as_api(error).body())
    yield "data: [DONE]\n\n"


async def _patiently(turn: Turn) -> AsyncIterator[Any]:
    """What comes of a turn, and None whenever that takes long."""
    parts = aiter(turn)
    coming = asyncio.ensure_future(anext(parts))
    try:
        while True:
            await asyncio.wait([coming], timeout=_PATIENCE)
            if coming.done():
                part = coming.result()
                coming = asyncio.ensure_future(anext(parts))
                yield part
            else:
                yield None
    except StopAsyncIteration:
        return
    finally:
        coming.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """Wait for a result as long as the client does. Raises ClientDisconnect."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page in a browser cannot send without asking first, see Access
        raise ApiError(415, "send Content-Type: application/json.", code="wrong_content_type")
    body, n = bytearray(), 0
    async for part in request.stream():
        n += len(part)
        if n <= MAX_BODY:
            body += part
        elif n > _DRAINED:
            break
    if n > MAX_BODY:
        raise ApiError(413, f"the request is larger than {MAX_BODY} bytes.", code="request_too_large")
    return bytes(body)


def _as_api(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.status_code, f"{error.detail}.", code=error.detail.lower().replace(" ", "_"))
        case Busy():
            return ApiError(429, str(error), code="queue_full", type="rate_limit_error")
        case Stopping() | Interrupted():
            return ApiError(503, str(Stopping()), code="stopping", type="server_error")
        case PromptError():
            return ApiError(400, str(error), code="invalid_value", param="messages")
    return ApiError(500, str(error), code="internal_error", type="server_error")


def _response(error: Exception) -> Response:
    told = _as_api(error)
    headers = {"WWW-Authenticate": "Bearer"} if told.status == 401 else {}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(error.seconds)
    return JSONResponse(told.body(), told.status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    return _response(error)


async def _our_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again, and its traceback is logged."""
    return _response(CnqError("an error in the server itself; its log tells more."))


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def loopback_names(host: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((host, "localhost", "127.0.0.1", "::1")))

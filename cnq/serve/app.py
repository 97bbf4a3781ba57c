"""The routes: OpenAI's requests to a model in slots."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..answer import Ask, answer
from ..chat import Style, prompt_tokens
from ..engine.model import Model, Sampling
from ..errors import CnqError, EngineError
from ..slots import Embedders, Put, Slots, Turn
from .access import Access, Guard
from .events import Events
from .protocol import ApiError, ChatRequest, CompletionRequest, EmbeddingRequest, parsed
from .protocol import Request as Wanted
from .refusals import nobody, our_bug, refused
from .replies import ChatReply, CompletionReply, Reply, embeddings

MAX_BODY = 4 << 20  # bytes; more than any context holds
_DRAINED = 4 * MAX_BODY  # read and thrown away of a larger one, so that the client gets to read the refusal

_T = TypeVar("_T")


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
        exception_handlers={CnqError: refused, HTTPException: refused, ClientDisconnect: nobody, Exception: our_bug},
    )


class _Api:
    def __init__(self, slots: Slots, embedders: Embedders, style: Style, name: str, created: int):
        self._slots, self._embedders, self._style, self._name = slots, embedders, style, name
        self._model = slots.model  # for its vocabulary alone
        self._described = {"id": name, "object": "model", "created": created, "owned_by": "cnq"}
        tokens = self._model.fields.get("tokenizer.ggml.tokens", [])
        self._longest = max((len(str(token).encode()) for token in tokens), default=1)

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
        prompt = await self._tokens(wanted.text, "prompt", going_on=True)
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

    async def _tokens(self, text: str | list[int], param: str, *, going_on: bool = False) -> list[int]:
        """Of a text that is no chat: with bos in front, once, and special tokens read as such.

        param: the request's field. going_on: whether the model goes on from it.
        """
        model = self._model
        if isinstance(text, list):
            if wrong := [token for token in text if not 0 <= token < model.n_vocab]:
                raise ApiError(400, f"there is no token {wrong[0]}.", code="invalid_value", param=param)
            tokens = text
        else:
            self._require_short(len(text.encode("utf-8", "surrogatepass")), "bytes", param)
            text = text.removeprefix(model.token_text("bos")) if model.adds_bos else text
            if going_on:
                tokens = await asyncio.to_thread(model.prompt, text, parse_special=True)
            else:
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
            for part in answer(model, ask, lambda: max(1, self._slots.n_running)):
                put(part)

        turn = self._slots.start(work, ask.prompt)
        if wanted.stream:
            return Events(turn, reply)
        try:
            return await _unless_gone(request, _whole(turn, reply))
        finally:
            turn.close()


async def _whole(turn: Turn, reply: Reply) -> Response:
    *pieces, end = [part async for part in turn]
    return JSONResponse(reply.whole(pieces, end))


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

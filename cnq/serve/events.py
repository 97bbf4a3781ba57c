"""An answer as server-sent events, as its pieces come."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..answer import End, Piece
from ..errors import CnqError
from ..slots import Turn
from .refusals import as_api
from .replies import Reply

_PATIENCE = 15  # seconds between signs of life while a prompt waits or is read: proxies give up on a silent connection


class Events(StreamingResponse):
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
        yield _event(as_api(error).body())
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

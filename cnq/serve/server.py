"""Running a web application on a port of this machine, from a free port found before the model loads to a graceful end."""

import asyncio
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ..chat import style_of
from ..errors import CnqError
from ..gguf_file import GgufFile
from ..slots import Embedders, open_slots
from .access import Access, loopback_names
from .app import make_app

QUEUE = 64  # requests that wait, by default
_GRACE = 3.0  # seconds that running answers get to end by themselves when the server is told to stop
_LAST = 1.0  # seconds for the last bytes to be read
_CONNECTIONS = 512  # at a time; beyond them uvicorn answers 503 by itself


@dataclass(frozen=True)
class Serving:
    """What is served where. slots: answers at a time. queue: how many more requests may wait. n_ctx: tokens."""

    url: str
    model: str
    slots: int
    queue: int
    n_ctx: int
    notes: tuple[str, ...] = ()


def serve(
    gguf: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    parallel: int | None = None,
    queue: int = QUEUE,
    n_ctx: int | None = None,
    cors: Sequence[str] = (),
    format: str | None = None,
    threads: int = 0,
    ready: Callable[[Serving], object] = lambda serving: None,
) -> None:
    """Serve a GGUF until SIGINT or SIGTERM. ready: called when requests are answered.

    host: other than the loopback only with an api_key. port: 0 = any free one. cors: origins of web pages that may ask.
    format: of the prompt; None = the GGUF's own template. parallel, n_ctx, threads: see open_slots.
    Raises GgufError, PromptError, EngineError, NoSpace, and CnqError: port in use, host unknown, no key where one is needed.
    """
    file = GgufFile(gguf)
    style = style_of(file.fields, gguf, format)
    name = gguf.stem
    with listening(host, port) as (listener, url):
        loopback = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        if not loopback and not api_key:
            raise CnqError(
                f"--host {host} lets other machines ask, and there is no key. Give one with --api-key or in CNQ_API_KEY, or "
                "leave --host away."
            )
        access = Access(api_key or None, None if api_key else loopback_names(host), tuple(cors))
        with open_slots(gguf, parallel=parallel, queue=queue, n_ctx=n_ctx, threads=threads) as (slots, notes):
            embedders = Embedders(slots.model, queue)

            async def stop() -> None:
                await slots.stop(_GRACE)
                await embedders.stop()

            serving = Serving(url, name, slots.n_slots, queue, slots.model.n_ctx, notes)
            app = make_app(slots, embedders, style, name, int(gguf.stat().st_mtime), access)
            run(app, listener, stop, lambda: ready(serving))


@contextmanager
def listening(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """A socket bound to an address, and the URL it is reached at. Raises CnqError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError, OverflowError) as error:
        raise CnqError(_why_not(host, port, error)) from error
    with listener:
        named = f"[{host}]" if ":" in host else host
        yield listener, f"http://{named}:{listener.getsockname()[1]}"


def _why_not(host: str, port: int, error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"port {port} of {host} is in use. End what listens there, or choose another with --port."
    if number == errno.EACCES:
        return f"port {port} is not for this user. Choose one above 1023 with --port."
    return f"{host} is no address of this machine ({getattr(error, 'strerror', None) or error}). Try --host 127.0.0.1."


def run(app: ASGIApp, listener: socket.socket, stop: Callable[[], Awaitable[None]], ready: Callable[[], object]) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends at once. stop: awaited while the last answers are sent."""
    config = uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="auto",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
    )
    asyncio.run(_Server(config, stop, ready).serve(sockets=[listener]))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, stop: Callable[[], Awaitable[None]], ready: Callable[[], object]):
        super().__init__(config)
        self._stop, self._ready = stop, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(self._end())
        await super().shutdown(sockets)
        await ending

    async def _end(self) -> None:
        """Have uvicorn, which waits for all connections, not wait for those who read no more, or for ever."""
        await self._stop()
        until = time.monotonic() + _LAST
        while self.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's, but the signal is not raised again in the end: to be told to stop is no failure."""
        if self.should_exit:
            os._exit(1)
        self.should_exit = True

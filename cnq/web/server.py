"""Running the page on a port of this machine, with nothing that leaves it."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..chat import Style, style_of
from ..errors import CnqError
from ..gguf_file import GgufFile
from ..serve.access import Access, Guard, loopback_names
from ..serve.server import Serving, listening, run
from ..slots import Slots, open_slots

QUEUE = 8  # questions that wait
# Whatever a page of Gradio or an answer of the model wants from elsewhere, the browser does not fetch it.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'none'; frame-ancestors 'none'"


def serve_page(
    gguf: Path,
    *,
    port: int = 7860,
    n_ctx: int | None = None,
    format: str | None = None,
    threads: int = 0,
    ready: Callable[[Serving], object] = lambda serving: None,
) -> None:
    """Serve a chat page on 127.0.0.1 until SIGINT or SIGTERM. ready: called when it can be opened.

    format: of the prompt; None = the GGUF's own template. Raises as `serve` does, and CnqError without gradio.
    """
    if not find_spec("gradio"):
        raise CnqError("the page is made by gradio, which is not installed: pip install 'cnq[web]'")
    host = "127.0.0.1"
    file = GgufFile(gguf)
    style = style_of(file.fields, gguf, format)
    with (
        listening(host, port) as (listener, url),
        open_slots(gguf, parallel=None, queue=QUEUE, n_ctx=n_ctx, threads=threads) as (slots, notes),
    ):
        app = _app(slots, style, gguf.stem, port)
        serving = Serving(url, gguf.stem, slots.n_slots, QUEUE, slots.model.n_ctx, notes)
        run(app, listener, lambda: slots.stop(0), lambda: ready(serving))


def _app(slots: Slots, style: Style, name: str, port: int) -> ASGIApp:
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio
    from fastapi import FastAPI

    from .page import CSS, FONTS, MONO_FONTS, make_page

    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        make_page(slots, style, name),
        path="/",
        server_name="127.0.0.1",
        server_port=port,
        footer_links=[],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gradio.themes.Default(font=FONTS, font_mono=MONO_FONTS),
        css=CSS,
    )
    return Guard(_Alone(app), Access(hosts=loopback_names("127.0.0.1")))


class _Alone:
    """Middleware that tells the browser to fetch nothing from anywhere else."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        await self._app(scope, receive, send_with_policy)

"""A server on this machine that answers chat completions as it is told to: items for training, or what endpoints do wrong."""

import asyncio
import json
import re
import socket
import threading
import time
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cnq.corpus import peoples_daily

SENTENCES = [s for d in peoples_daily("held-out").documents for s in re.split("[。！？\n]", d) if 20 < len(s) < 100]


def item(number: int) -> dict[str, str]:
    """Records that are like none of the others: real sentences."""
    return {
        "instruction": f"概括：{SENTENCES[3 * number]}",
        "input": SENTENCES[3 * number + 1],
        "output": SENTENCES[3 * number + 2],
    }


def completion(text: str, finish: str = "stop") -> JSONResponse:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return JSONResponse({"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 20}})


class Server:
    """answers: what to say to the next requests; when they are used up, `n` fresh items each, after `delay` seconds.

    seen, headers, at: of the requests, and when they came. given: items so far. most: requests answered at the same time.
    """

    def __init__(self) -> None:
        self.answers: list[Response] = []
        self.n, self.given, self.delay = 2, 0, 0.0
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, Any]] = []
        self.at: list[float] = []
        self.running = self.most = 0
        routes = [Route("/v1/chat/completions", self.complete, methods=["POST"]), Route("/v1/models", self.models)]
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.uvicorn = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    async def complete(self, request: Request) -> Response:
        self.at.append(time.monotonic())
        self.seen.append(await request.json())
        self.headers.append(dict(request.headers))
        if self.answers:
            return self.answers.pop(0)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.delay)
        self.running -= 1
        numbers = range(self.given, self.given + self.n)
        self.given += self.n
        return completion(json.dumps([item(i) for i in numbers], ensure_ascii=False))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "big"}, {"id": "small"}]})

    def close(self) -> None:
        self.uvicorn.should_exit = self.uvicorn.force_exit = True
        self.thread.join(5)
        self.socket.close()

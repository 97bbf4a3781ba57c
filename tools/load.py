"""Load a running `cnq serve` from another process: many askers at a time, some reading slowly, some gone before the end.

    python tools/load.py URL [--requests N] [--clients N] [--tokens N] [--key KEY] [--pid PID] [--json]

Every answer has to be complete, refused with 429 and then asked for again, or dropped by this side; anything else is a failure
and the exit status 1. --pid: of the server, to watch its memory. Latencies are of answers that were read at once, from the
first try to the last byte, waiting after 429 included.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

import psutil

KINDS = {"stream": 50, "whole": 20, "slow": 10, "dropped": 15, "embedding": 5}  # weights
QUESTIONS = [
    "用一句话解释什么是量化。",
    "北京的秋天是什么样的？",
    "What is a language model?",
    "写一首关于长江的短诗。",
    "Why is the sky blue?",
]
_PATIENCE = 120.0  # seconds without a byte are a failure: the server hangs
_SLOW = 0.05  # seconds between reads of 256 bytes


@dataclass
class Load:
    """first, last: seconds to the first piece of a streamed answer and to its end. refused: answers of 429. rss: bytes."""

    kinds: dict[str, int]
    seconds: float = 0.0
    tokens: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)


class Refused(Exception):
    def __init__(self, seconds: float):
        self.seconds = seconds


async def load(url: str, n: int, clients: int, n_tokens: int, key: str, pid: int | None) -> Load:
    random_ = random.Random(0)
    kinds = random_.choices(list(KINDS), list(KINDS.values()), k=n)
    jobs = list(enumerate(kinds))
    result = Load({kind: kinds.count(kind) for kind in KINDS})
    model = json.loads(await _get(url, "/v1/models", key))["data"][0]["id"]

    async def client() -> None:
        while jobs:
            number, kind = jobs.pop()
            started = time.perf_counter()
            while True:
                try:
                    await _one(result, url, key, model, number, kind, n_tokens, started)
                except Refused as refused:
                    result.refused += 1
                    await asyncio.sleep(min(refused.seconds, 1))
                    continue
                except (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError) as error:
                    result.failures.append(f"{number} {kind}: {type(error).__name__} {error}")
                break

    watching = asyncio.create_task(_watch(result, pid)) if pid else None
    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    result.seconds = time.perf_counter() - started
    if watching:
        await asyncio.sleep(0.5)
        watching.cancel()
    health = json.loads(await _get(url, "/health", key))
    if health["running"] or health["waiting"]:
        result.failures.append(f"after the last answer {health['running']} run and {health['waiting']} wait")
    return result


async def _one(result: Load, url: str, key: str, model: str, number: int, kind: str, n_tokens: int, started: float) -> None:
    question = QUESTIONS[number % len(QUESTIONS)]
    if kind == "embedding":
        told = json.loads(await _post(url, "/v1/embeddings", key, {"model": model, "input": question}))
        if len(told["data"]) != 1:
            raise ValueError(f"{len(told['data'])} vectors")
        return
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": n_tokens, "seed": number,
            "temperature": 0.7}  # fmt: skip
    if kind == "whole":
        told = json.loads(await _post(url, "/v1/chat/completions", key, body))
        result.tokens += told["usage"]["completion_tokens"]
        result.last.append(time.perf_counter() - started)
        return
    reader, writer = await _sent(url, "POST", "/v1/chat/completions", key, body | {"stream": True})
    try:
        leave_after = number % 5 if kind == "dropped" else None
        await _events(result, reader, kind, leave_after, started)
    finally:
        writer.close()


async def _events(result: Load, reader: asyncio.StreamReader, kind: str, leave_after: int | None, started: float) -> None:
    pieces, reason, buffer = 0, None, b""
    while True:
        if leave_after is not None and pieces >= leave_after:
            return
        if kind == "slow":
            await asyncio.sleep(_SLOW)
        part = await asyncio.wait_for(reader.read(256 if kind == "slow" else 1 << 16), _PATIENCE)
        if not part:
            raise ValueError(f"the stream broke off after {pieces} pieces")
        *events, buffer = (buffer + part).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                if reason not in ("stop", "length"):
                    raise ValueError(f"the answer ended with {reason}")
                if kind == "stream":
                    result.last.append(time.perf_counter() - started)
                return
            if event.startswith(b":"):
                continue
            choice = json.loads(data)["choices"][0]
            reason = choice["finish_reason"]
            if choice["delta"].get("content"):
                if kind == "stream" and not pieces:
                    result.first.append(time.perf_counter() - started)
                pieces += 1
                result.tokens += 1


async def _post(url: str, path: str, key: str, body: dict) -> bytes:
    reader, writer = await _sent(url, "POST", path, key, body)
    try:
        return await asyncio.wait_for(reader.read(), _PATIENCE)
    finally:
        writer.close()


async def _get(url: str, path: str, key: str) -> bytes:
    reader, writer = await _sent(url, "GET", path, key, None)
    try:
        return await asyncio.wait_for(reader.read(), _PATIENCE)
    finally:
        writer.close()


async def _sent(
    url: str, method: str, path: str, key: str, body: dict | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection of which the body of the answer is left to read. HTTP/1.0: its end is the end of the body."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 16)
    data = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {path} HTTP/1.0\r\nHost: {where.netloc}\r\nAuthorization: Bearer {key}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    lines = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _PATIENCE)).decode("latin-1").split("\r\n")
    status = int(lines[0].split()[1])
    if status == 200:
        return reader, writer
    told = await reader.read()
    writer.close()
    if status == 429:
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        raise Refused(float(headers["retry-after"]))
    raise ValueError(f"status {status}: {told[:200]!r}")


async def _watch(result: Load, pid: int) -> None:
    process = psutil.Process(pid)
    while True:
        result.rss.append(process.memory_info().rss)
        await asyncio.sleep(0.2)


def _show(r: Load) -> None:
    n = sum(r.kinds.values())
    print(
        f"{n} requests ({', '.join(f'{v} {k}' for k, v in r.kinds.items())}) in {r.seconds:.1f} s, {n / r.seconds:.1f} a second"
    )
    print(
        f"{r.tokens} tokens, {r.tokens / r.seconds:.1f} a second; refused and asked again {r.refused}; failed {len(r.failures)}"
    )
    for name, seconds in (("first piece", r.first), ("last byte", r.last)):
        if len(seconds) > 1:
            cuts = statistics.quantiles(seconds, n=100)
            print(f"{name}: p50 {statistics.median(seconds):.2f} s, p99 {cuts[98]:.2f} s, most {max(seconds):.2f} s")
    if r.rss:
        print(f"memory: {r.rss[0] / 1e6:.1f} MB before, {max(r.rss) / 1e6:.1f} MB at most, {r.rss[-1] / 1e6:.1f} MB after")
    for failure in r.failures[:20]:
        print(f"failed: {failure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--key", default="none")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    found = asyncio.run(load(a.url.removesuffix("/v1"), a.requests, a.clients, a.tokens, a.key, a.pid))
    if a.json:
        print(json.dumps(asdict(found)))
    else:
        _show(found)
    sys.exit(bool(found.failures))

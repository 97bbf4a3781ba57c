"""Chat completions from an endpoint of OpenAI's protocol, at a bearable pace and with patience."""

import asyncio
import email.utils
import ipaddress
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from cnq.errors import CnqError, listed

_TRIES = 7  # of one request; with the waits between them about two minutes
_LONGEST_WAIT = 60.0  # seconds, of our own choice
_LONGEST_ASKED = 600.0  # seconds that a Retry-After may ask for
_MOST_BYTES = 4 << 20  # of an answer
_PASSING = (408, 409, 425, 429)  # and 5xx: the same request may succeed later


class EndpointError(CnqError):
    """The endpoint will not answer, whatever is asked."""


class GaveUp(Exception):
    """This request was not answered; others may be."""


@dataclass(frozen=True)
class Reply:
    """cut: whether the model was stopped by a limit of length. Tokens are 0 where the endpoint does not count them."""

    text: str
    cut: bool
    prompt_tokens: int
    completion_tokens: int


class Endpoint:
    """Where to ask. An asynchronous context; `ask` may run several times at once.

    url: with the path before /chat/completions, as OPENAI_BASE_URL has it. key: None = none is sent. rate: requests a minute,
    0 = as they come. timeout: seconds for one answer. say: hears why something is asked again.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        *,
        key_name: str = "the key",
        rate: float = 0,
        timeout: float = 600,
        options: dict[str, Any] | None = None,
        say: Callable[[str], object] = lambda text: None,
    ):
        self._url, self._model, self._key_name, self._timeout, self._say = url.rstrip("/"), model, key_name, timeout, say
        self._options = options or {}
        self._pace = _Pace(60 / rate if rate else 0)
        self._answered = False
        self.retried = 0
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A proxy from the environment is for other machines.
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=30, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=not is_local(url),
        )

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def ask(self, prompt: str) -> Reply:
        """Answer one prompt. Raises GaveUp after the last try, EndpointError where trying is useless."""
        body = {"model": self._model, "messages": [{"role": "user", "content": prompt}], **self._options}
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                self.retried += 1
            await self._pace.turn()
            wait: float | None = None
            try:
                async with asyncio.timeout(self._timeout):
                    status, headers, raw = await self._sent("POST", "/chat/completions", body)
            except httpx.ConnectError as error:
                if not self._answered:
                    raise EndpointError(f"nothing answers at {self._url}: {error}. Start it first (cnq serve M.gguf), or mend "
                                        "--endpoint.") from None  # fmt: skip
                problem = f"no connection: {error}"
            except (httpx.HTTPError, TimeoutError, ValueError) as error:
                problem = f"{type(error).__name__} {error}".strip()
            else:
                if status == 200:
                    if reply := _reply(raw):
                        self._answered = True
                        return reply
                    problem = f"status 200 without a chat completion: {_shown(raw)}"
                else:
                    problem = f"status {status}: {_message(raw)}"
                    await self._require_passing(status, raw)
                    wait = _retry_after(headers)
            if attempt + 1 < _TRIES:
                await self._wait(attempt, wait, problem)
        raise GaveUp(f"{self._url} failed {_TRIES} times, the last time with {problem}")

    async def _sent(self, method: str, path: str, body: Any = None) -> tuple[int, httpx.Headers, bytes]:
        raw = b""
        async with self._client.stream(method, self._url + path, json=body) as response:
            async for part in response.aiter_bytes():
                raw += part
                if len(raw) > _MOST_BYTES:
                    raise ValueError(f"more than {_MOST_BYTES} bytes")
        return response.status_code, response.headers, raw

    async def _wait(self, attempt: int, asked: float | None, problem: str) -> None:
        """Sleep before the next try. What the endpoint asks for holds for all requests."""
        if asked is not None and asked > _LONGEST_ASKED:
            raise EndpointError(f"{self._url} asks to wait {asked:.0f} seconds ({problem}). Run the same command again then; "
                                "it goes on where it stopped.")  # fmt: skip
        seconds = random.uniform(0.5, 1) * min(_LONGEST_WAIT, 2.0 ** (attempt + 1))
        if asked is not None:
            seconds = asked
            self._pace.hold(asked)
        self._say(f"{problem}; trying again in {seconds:.1f} s")
        await asyncio.sleep(seconds)

    async def _require_passing(self, status: int, raw: bytes) -> None:
        """Raise unless the same request may be answered later."""
        told = f"{self._url} answers {status}: {_message(raw)}."
        if status == 402 or "insufficient_quota" in raw.decode("utf-8", "replace"):
            raise EndpointError(f"{told} The account is used up: top it up, or give another key in {self._key_name}.")
        if status in _PASSING or status >= 500:
            return
        if status in (401, 403):
            raise EndpointError(f"{told} Set a key that is valid there: export {self._key_name}=…")
        if status == 404:
            raise EndpointError(f"{told} {await self._has()}")
        if self._answered and status in (400, 413, 422):  # this prompt alone, e.g. a filter of contents
            raise GaveUp(told)
        raise EndpointError(f"{told} {await self._has()}")

    async def _has(self) -> str:
        """What the endpoint has, for a message: it was asked for a model or a path that is not there."""
        try:
            async with asyncio.timeout(10):
                _, _, raw = await self._sent("GET", "/models")
            names = [str(model["id"]) for model in json.loads(raw)["data"]]
        except (httpx.HTTPError, TimeoutError, ValueError, KeyError, TypeError):
            return f"--endpoint has to be what /chat/completions follows, mostly ending in /v1; it was {self._url}."
        return f"Its models: {listed(names, 20)}; --model was {self._model}."


class _Pace:
    """Turns, `gap` seconds apart."""

    def __init__(self, gap: float):
        self._gap, self._next = gap, 0.0

    async def turn(self) -> None:
        at = max(time.monotonic(), self._next)
        self._next = at + self._gap
        await asyncio.sleep(at - time.monotonic())

    def hold(self, seconds: float) -> None:
        """No further turn for so long."""
        self._next = max(self._next, time.monotonic() + seconds)


def is_local(url: str) -> bool:
    """Whether a URL names this machine. Raises EndpointError for what is no URL of a server."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise EndpointError(f"{url!r} is no URL: {error}. Expected one like http://127.0.0.1:8000/v1.") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise EndpointError(f"{url!r} is no URL of a server. Expected one like http://127.0.0.1:8000/v1.")
    try:
        return ipaddress.ip_address(parts.host).is_loopback
    except ValueError:
        return parts.host == "localhost" or parts.host.endswith(".localhost")


def _reply(raw: bytes) -> Reply | None:
    """The first choice of a chat completion; None for anything else."""
    try:
        told = json.loads(raw)
        choice, usage = told["choices"][0], told.get("usage") or {}
        text = choice["message"]["content"] or ""
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        return Reply(text, choice.get("finish_reason") == "length", *counts) if isinstance(text, str) else None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None


def _message(raw: bytes) -> str:
    """What an error's body says: OpenAI's {"error": {"message": …}}, or its beginning."""
    try:
        error = json.loads(raw)["error"]
        return _shown(str(error["message"] if isinstance(error, dict) else error).rstrip(". ").encode())
    except (ValueError, KeyError, TypeError, RecursionError):
        return _shown(raw)


def _shown(raw: bytes) -> str:
    text = " ".join(raw[:2000].decode("utf-8", "replace").split())
    return (text if len(text) <= 200 else text[:199] + "…") or "(nothing)"


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that a Retry-After header asks for, a number or a date (RFC 9110 10.2.3); None without a legible one."""
    told = headers.get("retry-after", "")
    try:
        return max(0.0, float(told)) if told.replace(".", "", 1).isascii() and float(told) < float("inf") else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None

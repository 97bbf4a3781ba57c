"""What keeps strangers out."""

import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .protocol import ApiError
from .refusals import response


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


def loopback_names(host: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((host, "localhost", "127.0.0.1", "::1")))


class Guard:
    """Middleware that lets in whom Access allows."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._objection(scope["path"], Headers(scope=scope))):
            await response(error)(scope, receive, send)
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

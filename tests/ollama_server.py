"""A server on this machine that speaks as Ollama does about blobs and models, and can be told to fail in its ways."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Ollama:
    """blobs: digest -> bytes. models: name -> request. seen: "METHOD path" in order. fail: what goes wrong, None = nothing."""

    url: str = ""
    fail: str | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Ollama

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.state.seen.append(f"HEAD {self.path[:16]}")
        self._answer(200 if self.path.rpartition("/")[2] in self.state.blobs else 404)

    def do_GET(self) -> None:
        self.state.seen.append(f"GET {self.path}")
        if self.state.fail == "not ollama":
            self._raw(200, b"<html>It works!</html>")
        elif self.path == "/api/tags":
            self._answer(200, {"models": []})
        else:
            self._answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        self.state.seen.append(f"POST {self.path[:16]}")
        if self.path.startswith("/api/blobs/"):
            self._blob(self.path.rpartition("/")[2])
        elif self.path == "/api/create":
            self._create(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        else:
            self._answer(404, {"error": "not found"})

    def _blob(self, digest: str) -> None:
        left, body = int(self.headers["Content-Length"]), b""
        if self.state.fail == "hang up while sending":
            self.rfile.read(min(left, 1000))
            self.close_connection = True
            self.connection.close()
            return
        while left:
            piece = self.rfile.read(min(left, 1 << 16))
            body, left = body + piece, left - len(piece)
        if self.state.fail == "another digest":
            body += b"x"
        if (got := f"sha256:{hashlib.sha256(body).hexdigest()}") != digest:
            self._answer(400, {"error": f'digest mismatch, expected "{digest}", got "{got}"'})
            return
        self.state.blobs[digest] = body
        self._answer(201)

    def _create(self, request: dict[str, Any]) -> None:
        if self.state.fail == "400":
            self._answer(400, {"error": "invalid model name"})
            return
        missing = [d for d in request["files"].values() if d not in self.state.blobs]
        if missing:
            self._answer(400, {"error": f"blob not found: {missing[0]}"})
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for status in ("parsing GGUF", "using existing layer", "writing manifest"):
            self._line({"status": status})
            if self.state.fail == "hang up while creating":
                self.close_connection = True
                self.connection.close()
                return
            if self.state.fail == "error while creating":
                self._line({"error": "write /root/.ollama/models/blobs/x: no space left on device"})
                self._chunk(b"")
                return
        if self.state.fail != "no success":
            self._line({"status": "success"})
            self.state.models[request["model"]] = request
        self._chunk(b"")

    def _line(self, value: dict[str, str]) -> None:
        self._chunk(json.dumps(value).encode() + b"\n")

    def _chunk(self, raw: bytes) -> None:
        self.wfile.write(f"{len(raw):X}\r\n".encode() + raw + b"\r\n")
        self.wfile.flush()

    def _answer(self, status: int, value: dict[str, Any] | None = None) -> None:
        self._raw(status, json.dumps(value).encode() if value is not None else b"")

    def _raw(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(fail: str | None = None) -> Iterator[Ollama]:
    state = Ollama(fail=fail)
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

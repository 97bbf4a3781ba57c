"""GGUF → a model in a running Ollama: the file goes up as a blob, then the server makes the model of it.

Through the official client, version 0.6; API: ollama server/create.go and server/routes.go, as of v0.32 (2026-08).
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import ollama

from ..errors import NoSpace, OllamaError
from ..files import decimal
from .modelfile import recipe_of

COPIES = 3  # of the GGUF that Ollama may have on its disk at once: what was sent, and it writes the file anew
HOST = "http://127.0.0.1:11434"
_PART = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(rf"(?:(?:{_PART}(?::\d+)?/)?[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}}/)?{_PART}(?::{_PART})?")


@dataclass(frozen=True)
class Created:
    """name: as Ollama knows the model. sent: whether the file had to go up; it had not if the server knew it already."""

    name: str
    host: str
    path: Path
    format: str | None
    nbytes: int
    sent: bool
    seconds: float
    notes: tuple[str, ...]


def create(
    gguf: Path,
    name: str,
    *,
    host: str | None = None,
    format: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
    say: Callable[[str], object] = lambda text: None,
) -> Created:
    """Make the model `name` of a GGUF in the Ollama at `host`.

    host: URL; None = $OLLAMA_HOST, or this machine. format: a name in prompts.FORMATS; None = the one that the GGUF's chat
    template says. force: also where the disk may be too small. progress: called with bytes sent and bytes in all. say: called
    with each thing that the server does.
    Raises GgufError, PromptError, NoSpace (the server is on this machine), OllamaError: no Ollama there, a name it would
    refuse, or its own words.
    """
    started = time.perf_counter()
    if not _NAME.fullmatch(name):
        raise OllamaError(
            f"{name!r} is no name for a model of Ollama. Take Latin letters, digits and _ . -, with a tag or none: my-model:q4"
        )
    recipe = recipe_of(gguf, format)
    host = host or os.environ.get("OLLAMA_HOST") or HOST
    upload = _Upload(gguf.stat().st_size, progress)
    with _told(host), ollama.Client(host, transport=upload, timeout=httpx.Timeout(None, connect=5)) as client:
        client.list()
        if _is_here(host) and not force:
            _require_space(gguf)
        say(f"sending {gguf.name}")
        digest = client.create_blob(gguf)
        status = None
        for answer in client.create(
            name,
            files={"model.gguf": digest},
            template=recipe.template,
            system=recipe.system,
            license=recipe.license,
            parameters=recipe.parameters,
            stream=True,
        ):
            if answer.status and answer.status != status:
                say(status := answer.status)
    if status != "success":
        raise OllamaError(f"Ollama at {host} broke off while it made {name}; its last word was {status!r}. See its log.")
    seconds = time.perf_counter() - started
    return Created(name, host, gguf, recipe.format, upload.size, upload.sent, seconds, recipe.notes)


def names(name: str, ggufs: Sequence[Path]) -> list[str]:
    """A model's name for each GGUF: of several, the parts by which their file names differ become tags.

    Raises OllamaError for a name that has a tag already.
    """
    if len(ggufs) == 1:
        return [name]
    if ":" in name:
        raise OllamaError(f"{name} has a tag, but {len(ggufs)} files need one each. Leave it out.")
    stems = [gguf.stem for gguf in ggufs]
    cuts = [0, *(i + 1 for i, c in enumerate(stems[0]) if c == "-")]
    cut = max(cut for cut in cuts if all(stem.startswith(stems[0][:cut]) for stem in stems))
    return [f"{name}:{stem[cut:]}" for stem in stems]


class _Upload(httpx.HTTPTransport):
    """What the client leaves out: it asks first whether the server has the file, and counts what goes up."""

    def __init__(self, size: int, progress: Callable[[int, int], object]):
        super().__init__()
        self.size, self.sent, self._progress = size, False, progress

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.method != "POST" or "/api/blobs/" not in request.url.path:
            return super().handle_request(request)
        found = super().handle_request(httpx.Request("HEAD", request.url, headers=_without_body(request)))
        found.close()
        if found.status_code == httpx.codes.OK:
            return httpx.Response(httpx.codes.OK)
        self.sent = True
        body = request.stream
        assert isinstance(body, httpx.SyncByteStream)
        request.stream = _Counted(body, self.size, self._progress)
        return super().handle_request(request)


def _without_body(request: httpx.Request) -> dict[str, str]:
    return {k: v for k, v in request.headers.items() if k not in ("content-length", "transfer-encoding", "content-type")}


class _Counted(httpx.SyncByteStream):
    def __init__(self, body: httpx.SyncByteStream, size: int, progress: Callable[[int, int], object]):
        self._body, self._size, self._progress = body, size, progress

    def __iter__(self) -> Iterator[bytes]:
        done = 0
        for chunk in self._body:
            yield chunk
            done += len(chunk)
            self._progress(done, self._size)

    def close(self) -> None:
        self._body.close()


@contextmanager
def _told(host: str) -> Iterator[None]:
    """What goes wrong between here and the server, in words a user can act on."""
    try:
        yield
    except ollama.ResponseError as error:
        raise OllamaError(f"Ollama at {host} refuses: {error.error}") from None
    except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout):
        raise OllamaError(f"no Ollama answers at {host}. {_how_to_start()}") from None
    except httpx.HTTPError as error:
        raise OllamaError(f"the connection to Ollama at {host} broke: {error}. See its log, and try again.") from None
    except (ValueError, httpx.InvalidURL) as error:
        raise OllamaError(f"what answers at {host} does not speak as Ollama: {error}. Is --host right?") from None


def _how_to_start() -> str:
    if shutil.which("ollama"):
        return "It is installed: start it with `ollama serve`, or name another with --host."
    return (
        "Install it from ollama.com/download (on Linux: curl -fsSL https://ollama.com/install.sh | sh) and start it with "
        "`ollama serve`, or name another with --host. Without it, cnq ollama M.gguf writes a Modelfile for later."
    )


def _is_here(host: str) -> bool:
    name = urlsplit(host if "://" in host else f"http://{host}").hostname or ""
    return name in ("", "localhost", "::1", "0.0.0.0") or name.startswith("127.")


def _require_space(gguf: Path) -> None:
    """Raise NoSpace unless the disk of Ollama's models may hold as many copies as it makes."""
    service = Path("/usr/share/ollama/.ollama/models")  # of Ollama as a service on Linux
    places = [Path(p) for p in (os.environ.get("OLLAMA_MODELS"), Path.home() / ".ollama" / "models", service) if p]
    folder = next((p for p in places if _is_folder(p)), Path.home())
    need, free = COPIES * gguf.stat().st_size, shutil.disk_usage(folder).free
    if free < need:
        raise NoSpace(
            f"{folder}: {decimal(free)} free, and Ollama may hold {COPIES} copies of {gguf.name} at once, {decimal(need)}. "
            "Make room, move its models ($OLLAMA_MODELS), or try with --force."
        )


def _is_folder(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir()
    return False

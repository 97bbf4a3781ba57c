"""How fast a GGUF runs here and how much memory it takes: tokens a second of a prompt, of an answer, and peak memory.

The model runs in a process of its own, so that the memory is that model's alone and a crash of native code becomes one error.
"""

import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from .engine.child import Child, Tell, serve
from .errors import EngineError
from .gguf_file import GgufFile
from .machine import physical_cores

_SEED = 0  # the same prompt every time


@dataclass(frozen=True)
class Speed:
    """prefill, decode: tokens a second. ram: bytes, the most that was resident at any time.

    ram counts the whole process: Python with cnq and llama.cpp, the pages of the file that were read (they are mapped, and
    go back to the system when it needs them), a context of n_prompt tokens, and llama.cpp's own buffers.
    """

    prefill: float
    decode: float
    ram: int
    n_prompt: int
    n_gen: int
    threads: int


def measure_speed(gguf: Path, *, n_prompt: int = 512, n_gen: int = 32, threads: int = 0) -> Speed:
    """Run random tokens through `gguf`, as llama-bench's pp and tg tests do: after one token to warm up, `n_prompt` tokens
    in one pass, then `n_gen` tokens one by one from an empty context.

    threads: 0 = physical cores. A model with a shorter context gets a shorter prompt; Speed says how long it was.
    Raises GgufError, and EngineError with llama.cpp's words, or the signal that killed it.
    """
    GgufFile(gguf)  # what is no GGUF is refused here, by name
    request = {"gguf": str(gguf), "n_prompt": n_prompt, "n_gen": n_gen, "threads": threads}
    with Child(__name__, lambda reason: EngineError(f"{gguf} was not timed: {reason}")) as child:
        return Speed(**child.ask("measure", request))


# The child's side


def _measure(gguf: str, n_prompt: int, n_gen: int, threads: int) -> Speed:
    import numpy as np

    from .engine.model import Model

    path = Path(gguf)
    file = GgufFile(path)
    trained = file.fields.get(f"{file.arch}.context_length")
    if isinstance(trained, int) and trained > 1:
        n_prompt, n_gen = min(n_prompt, trained - 1), min(n_gen, trained - 1)  # room for the token after
    n_threads = threads or physical_cores()
    n_ctx = max(n_prompt, n_gen) + 1
    with Model(path, n_ctx=n_ctx, n_batch=n_prompt, n_threads=n_threads) as model:
        ids = np.random.default_rng(_SEED).integers(0, model.n_vocab, n_ctx).tolist()
        model.logits(ids[:1])  # brings the file into memory, and forgets
        started = time.perf_counter()
        model.next_logits(ids[:n_prompt])
        prefill = n_prompt / (time.perf_counter() - started)
        model.logits(ids[:1])
        started = time.perf_counter()
        for n in range(n_gen):  # each prompt is the last and one token more, and only that one is computed
            model.next_logits(ids[: n + 1])
        decode = n_gen / (time.perf_counter() - started)
    return Speed(prefill, decode, _peak(), n_prompt, n_gen, n_threads)


def _peak() -> int:
    """Bytes of this process that were resident at its peak.

    On Linux not getrusage: its ru_maxrss survives exec, so that a child of a large parent reports the parent's peak.
    """
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # the others count in KiB


def _step(tell: Tell, **request: Any) -> dict[str, Any]:
    return asdict(_measure(**request))


if __name__ == "__main__":
    serve({"measure": _step})

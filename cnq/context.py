"""How long a context a model gets: what it was trained with, what was asked for, and what the memory holds."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.filesize import decimal

from .errors import NoSpace
from .gguf_file import GgufFile

MAX_CTX = 4096  # tokens, unless more are asked for; longer contexts cost memory from the start
MIN_CTX = 512  # however little memory there is
_STEP = 256  # llama.cpp rounds a context up to it
_BATCH = 512  # tokens computed at once
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Context:
    """n_ctx: tokens. notes: what the user should know about it."""

    n_ctx: int
    notes: tuple[str, ...] = ()


def choose_context(file: GgufFile, wanted: int | None = None, free: int | None = None) -> Context:
    """The context for a conversation. wanted: tokens, None = the model's own, at most MAX_CTX, and what fits. free: bytes.

    Raises NoSpace when what was asked for does not fit.
    """
    free = free_memory() if free is None else free
    trained = file.fields.get(f"{file.arch}.context_length")
    trained = trained if isinstance(trained, int) and trained > 0 else None
    each, buffers = max(1, cache_bytes(file)), _buffers(file)
    if wanted:
        if each * wanted + buffers > free:
            fits = max(0, free - buffers) // each // _STEP * _STEP
            raise NoSpace(
                f"a context of {wanted} tokens takes {decimal(each * wanted + buffers)} beside the model, {decimal(free)} of "
                f"memory are free. " + (f"Try --ctx {fits}." if fits else "Close other programs, or take a smaller model.")
            )
        note = f"the model was trained with {trained} tokens: beyond them, of the {wanted} asked for, it may write nonsense"
        return Context(wanted, (note,) if trained and wanted > trained else ())
    own = min(trained or MAX_CTX, MAX_CTX)
    weights = file.path.stat().st_size
    room = free - weights - buffers
    if each * own <= room:
        return Context(own)
    n_ctx = min(own, max(MIN_CTX, room // each // _STEP * _STEP))
    notes = []
    if room < each * n_ctx:
        notes.append(
            f"the model is {decimal(weights)}, {decimal(free)} of memory are free: it will be slow, or end for want of it"
        )
    if n_ctx < own:
        notes.append(f"the context is {n_ctx} tokens instead of {own}: {decimal(free)} of memory are free. --ctx sets another")
    return Context(n_ctx, tuple(notes))


def cache_bytes(file: GgufFile) -> int:
    """Bytes of keys and values of one token, as float16; 0 when the metadata do not say it."""

    def number(key: str, default: int = 0) -> int:
        value = file.fields.get(f"{file.arch}.{key}", default)
        return value if isinstance(value, int) else default

    layers, heads, width = (number(k) for k in ("block_count", "attention.head_count", "embedding_length"))
    if not heads:
        return 0
    per_head = number("attention.key_length", width // heads) + number("attention.value_length", width // heads)
    groups = file.fields.get(f"{file.arch}.attention.head_count_kv", heads)
    of_layers = groups if isinstance(groups, list) else [groups] * min(layers, 512)
    return 2 * per_head * sum(n for n in of_layers if isinstance(n, int))


def _buffers(file: GgufFile) -> int:
    """About what llama.cpp computes in: a batch's logits, and its widest activations."""
    tokens, width = file.fields.get("tokenizer.ggml.tokens"), file.fields.get(f"{file.arch}.embedding_length")
    n_vocab = len(tokens) if isinstance(tokens, list) else 0
    return 4 * _BATCH * (n_vocab + 16 * (width if isinstance(width, int) else 0))


def free_memory() -> int:
    """Bytes that a new program may take: the machine's, or what the container (cgroup v2) still allows."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, StopIteration):  # no container, or no limit ("max")
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        free = min(free, limit - used + cached)
    return free

"""How long a context a model gets: what it was trained with, what was asked for, and what the memory holds."""

from dataclasses import dataclass

from rich.filesize import decimal

from .errors import NoSpace
from .gguf_file import GgufFile
from .machine import free_memory

MAX_CTX = 4096  # tokens, unless more are asked for; longer contexts cost memory from the start
MIN_CTX = 512  # however little memory there is
_STEP = 256  # llama.cpp rounds a context up to it
_BATCH = 512  # tokens computed at once


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
    trained = file.n_ctx
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


def room_for_weights(file: GgufFile, n_ctx: int | None = None, memory: int | None = None) -> int:
    """Bytes that a file of this model may have to run in `memory` (None = what is free here) with a context of `n_ctx` tokens.

    n_ctx: None = the model's own, at most MAX_CTX. Raises NoSpace when the context alone takes it all.
    """
    memory = free_memory() if memory is None else memory
    n_ctx = n_ctx or min(file.n_ctx or MAX_CTX, MAX_CTX)
    context = cache_bytes(file) * n_ctx + _buffers(file)
    if context >= memory:
        raise NoSpace(
            f"a context of {n_ctx} tokens takes {decimal(context)} of {decimal(memory)} of memory. Give more, or try a "
            "smaller --ctx."
        )
    return memory - context


def cache_bytes(file: GgufFile) -> int:
    """Bytes of keys and values of one token, as float16; 0 when the metadata do not say it."""
    return 2 * file.kv_width


def _buffers(file: GgufFile) -> int:
    """About what llama.cpp computes in: a batch's logits, and its widest activations."""
    tokens, width = file.fields.get("tokenizer.ggml.tokens"), file.fields.get(f"{file.arch}.embedding_length")
    n_vocab = len(tokens) if isinstance(tokens, list) else 0
    return 4 * _BATCH * (n_vocab + 16 * (width if isinstance(width, int) else 0))

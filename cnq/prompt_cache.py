"""Prefixes of prompts that were computed before: the first token after a long system text comes at once the next time.

A folder for each kind of context (Model.identity: weights, llama.cpp, form of the cache), in it a file for each prefix, named
by its length and the sha256 of its tokens. The files are sealed (engine/state.py): a damaged one is deleted and computed again.
They hold what was told to the model, so that only the user may read them.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from .engine.model import Model
from .errors import CnqError, SessionError
from .files import user_dir

LEAST = 64  # tokens: fewer are computed as soon as read
LIMIT = 4 << 30  # bytes of all prefixes together; those that were not used for the longest time go
_NAME = re.compile(r"(\d{1,9})-[0-9a-f]{32}\.kv")


def restore(model: Model, tokens: Sequence[int], folder: Path | None = None) -> int:
    """Bring the longest stored prefix of `tokens` into the context, unless more of them is there: how many are in it now.

    folder: None = the user's. Raises nothing: what cannot be read counts as not stored.
    """
    held = model.holds(tokens)
    with suppress(CnqError, OSError):
        place = _place(model, folder)
        lengths = {int(m[1]) for path in place.glob("*.kv") if (m := _NAME.fullmatch(path.name))}
        for n in sorted((n for n in lengths if held < n <= len(tokens)), reverse=True):
            if (path := place / _name(tokens[:n])).exists():
                try:
                    held = model.load_state(path)
                except SessionError:
                    held = model.holds(tokens)
                    path.unlink(missing_ok=True)
                    continue
                os.utime(path)
                break
    return held


def store(model: Model, tokens: Sequence[int], folder: Path | None = None, limit: int = LIMIT) -> bool:
    """Keep a prefix; what the context lacks of it is computed, and it then ends there. False: too short, or too large.

    limit: bytes of the whole folder. Raises NoSpace, CnqError (not writable), EngineError (no plain cache), Interrupted.
    """
    if not LEAST <= len(tokens) <= model.n_ctx:
        return False
    model.read(tokens)
    place = _place(model, folder)
    path = place / _name(tokens)
    if path.exists():
        return True
    if model.state_bytes > limit:
        return False
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        model.save_state(path)
        _make_room(place.parent, limit)
        return True
    except OSError as error:
        raise CnqError(f"{place} cannot be written: {error.strerror or error}.") from error


def _place(model: Model, folder: Path | None) -> Path:
    return (folder or user_dir("cache") / "prompts") / model.identity[:32]


def _name(tokens: Sequence[int]) -> str:
    return f"{len(tokens)}-{hashlib.sha256(np.asarray(tokens, '<i4').tobytes()).hexdigest()[:32]}.kv"


def _make_room(folder: Path, limit: int) -> None:
    """Delete the prefixes that were not used for the longest time, until the rest fits."""
    found = []
    for path in folder.glob("*/*.kv"):
        with suppress(FileNotFoundError):  # another cnq does the same
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size

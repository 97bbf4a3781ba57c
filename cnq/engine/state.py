"""A context in a file: what llama.cpp writes of a sequence, then whose it is, then a checksum of all that.

llama.cpp trusts such a file: a wrong position ends the process, a wrong number spoils every answer after it. So it is shown
only files that are whole, of the same model, and of the form that Model.save_state leaves.

Layout: llama-context.cpp, llama_context::state_seq_save_file, and llama-kv-cache.cpp, llama_kv_cache::state_write.
"""

import hashlib
import struct
from pathlib import Path
from typing import BinaryIO

import llama_cpp.llama_cpp as lib
import numpy as np

from ..errors import EngineError, SessionError

_HEAD = struct.Struct("<III")  # magic, version, number of tokens; then the tokens
_CELLS = struct.Struct("<II")  # streams, cells; then _CELL for each
_CELL = np.dtype([("position", "<i4"), ("n_sequences", "<u4"), ("sequence", "<i4")])
_SEAL = 32 + 32  # bytes: identity, sha256


def seal(path: Path, identity: bytes) -> None:
    """Make a file that llama.cpp wrote one that `unsealed` accepts. Raises EngineError for a context that is no plain cache."""
    with path.open("rb+") as f:
        if _tokens(f) is None:
            raise EngineError("contexts of this kind of model cannot be kept: its state is more than keys and values.")
        f.seek(0, 2)
        f.write(identity)
        f.write(_sha256(f, f.tell()))


def unsealed(path: Path, identity: bytes) -> list[int]:
    """The tokens whose keys and values a file holds. Raises SessionError when it is damaged or another model's."""
    try:
        with path.open("rb") as f:
            end = f.seek(0, 2) - _SEAL
            f.seek(max(0, end))
            whose, checksum = f.read(32), f.read(32)
            if end < 0 or _sha256(f, end + 32) != checksum or (tokens := _tokens(f)) is None:
                raise SessionError(f"{path} is damaged. Delete it: it will be computed again.")
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror or error}.") from error
    if whose != identity:
        raise SessionError(f"{path} is of another model or another llama.cpp. Delete it: it will be computed again.")
    return tokens


def _tokens(f: BinaryIO) -> list[int] | None:
    """The tokens, when each has one cell at its own position; else None."""
    f.seek(0)
    try:
        magic, version, n = _HEAD.unpack(f.read(_HEAD.size))
        tokens = np.frombuffer(f.read(4 * n), "<i4", n)
        streams, cells = _CELLS.unpack(f.read(_CELLS.size))
        if (magic, version, streams, cells) != (lib.LLAMA_STATE_SEQ_MAGIC, lib.LLAMA_STATE_SEQ_VERSION, 1, n) or not n:
            return None
        table = np.frombuffer(f.read(_CELL.itemsize * n), _CELL, n)
    except (struct.error, ValueError):
        return None
    sound = (np.sort(table["position"]) == np.arange(n)).all() and (table["n_sequences"] == 1).all()
    return tokens.tolist() if sound else None


def _sha256(f: BinaryIO, end: int) -> bytes:
    """Of the first `end` bytes."""
    digest = hashlib.sha256()
    f.seek(0)
    while end > 0 and (part := f.read(min(end, 1 << 20))):
        digest.update(part)
        end -= len(part)
    return digest.digest()

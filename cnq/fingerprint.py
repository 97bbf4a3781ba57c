"""Which model a GGUF holds, told from others without reading all of it."""

import hashlib
import struct

from .gguf_file import GgufFile

_PAGE = 4096


def fingerprint(file: GgufFile) -> bytes:
    """32 bytes that tell a model from others without reading all of it: from metadata, tensor table, size, and from the
    first, the middle and the last page of every tensor. Wherever the file lies and whatever it is called."""
    digest = hashlib.sha256()
    with file.path.open("rb") as f:
        digest.update(f.read(file.meta_bytes))
        digest.update(struct.pack("<Q", f.seek(0, 2)))
        for tensor in file.tensors.values():
            start, last = file.data_start + tensor.offset, max(0, tensor.nbytes - _PAGE)
            for at in (0, last // 2, last):
                f.seek(start + at)
                digest.update(f.read(min(_PAGE, tensor.nbytes)))
    return digest.digest()

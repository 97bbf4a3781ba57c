"""Knowing a model again by its numbers: re-saved files differ in container, order and padding, tensors do not."""

import hashlib
from collections.abc import Callable

import numpy as np

from ..gguf_file import Tensor
from .checkpoint import Checkpoint


def tensor_digests(
    checkpoint: Checkpoint, progress: Callable[[int, int], object] = lambda done, total: None
) -> dict[str, tuple[str, str]]:
    """Name -> ("F16 (32000, 4096)", sha256 of its bytes, row after row) of every tensor, by Hugging Face's names.

    progress: called with bytes read and bytes in all.
    """
    total = sum(entry.nbytes for entry in checkpoint.entries.values())
    done = 0
    digests = {}
    for name, entry in checkpoint.entries.items():
        digests[name] = tensor_digest(checkpoint.read(name))
        done += entry.nbytes
        progress(done, total)
    return digests


def tensor_digest(tensor: Tensor) -> tuple[str, str]:
    """("F16 (32000, 4096)", sha256 of the bytes, row after row) of a tensor."""
    raw = np.ascontiguousarray(tensor.data)
    return f"{tensor.type.name} {tensor.shape}", hashlib.sha256(raw.data).hexdigest()


def content_digest(checkpoint: Checkpoint, progress: Callable[[int, int], object] = lambda done, total: None) -> str:
    """sha256 over names, types, shapes and bytes of all tensors, whatever files they lie in and in whatever order.

    progress: as of tensor_digests.
    """
    return overall(tensor_digests(checkpoint, progress))


def overall(digests: dict[str, tuple[str, str]]) -> str:
    """The content digest that tensor digests add up to."""
    lines = (f"{name} {kind} {digest}\n" for name, (kind, digest) in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()

"""Models on disk, whatever their format."""

from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .gguf import open_gguf
from .hf import open_hf

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF file. Raises CheckpointError, GgufError, UnsupportedArch."""
    try:
        return open_gguf(path) if path.is_file() else open_hf(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Look at the disk and the permissions."
        ) from error

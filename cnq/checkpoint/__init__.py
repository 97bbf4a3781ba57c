"""Models on disk, whatever their format."""

from pathlib import Path

from .checkpoint import Checkpoint
from .gguf import open_gguf
from .hf import open_hf

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF file. Raises CheckpointError, GgufError, UnsupportedArch."""
    return open_gguf(path) if path.is_file() else open_hf(path)

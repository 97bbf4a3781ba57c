"""Models on disk, whatever their format."""

from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .gguf import open_gguf
from .hf import has_weights, open_hf
from .meta import is_meta, open_meta

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face directory, one in Meta's layout (the weights of both: Hugging Face's), or a GGUF file.

    Raises CheckpointError, GgufError, UnsupportedArch, UnsupportedVocab.
    """
    try:
        if path.is_file():
            if path.suffix in (".pth", ".bin", ".safetensors"):
                raise CheckpointError(f"{path} is one file of a checkpoint. Give its directory: {path.parent}")
            return open_gguf(path)
        return open_meta(path) if path.is_dir() and is_meta(path) and not has_weights(path) else open_hf(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Look at the disk and the permissions."
        ) from error

"""What every kind of checkpoint gives: config, tokenizer files, tensor names, and one tensor at a time."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..archs.arch import Arch
from ..archs.tensors import Config, Link, grouped
from ..errors import CheckpointError, listed
from ..gguf_file import BF16, F16, F32, Tensor, TensorType


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor before it is read. shape: rows first. decoded: from a quantized type, which it was in."""

    type: TensorType
    shape: tuple[int, ...]
    decoded: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


# What a file of weights gives: what is known of a tensor, and how to read it; by tensor name.
Weight = tuple[Entry, Callable[[], Tensor]]
Weights = dict[str, Weight]

_FLOATS = {"F32": F32, "F16": F16, "BF16": BF16}


def float_type(path: Path, name: str, dtype: str) -> TensorType:
    """The type that a file calls `dtype`. Raises CheckpointError for one that is no float."""
    if dtype not in _FLOATS:
        raise CheckpointError(
            f"{path}: {name} is {dtype}, expected F32, F16 or BF16. Start from the float checkpoint of the model."
        )
    return _FLOATS[dtype]


def typed(raw: np.ndarray, type: TensorType, shape: tuple[int, ...]) -> np.ndarray:
    """Raw bytes as Tensor.data wants them."""
    if type == BF16:
        return raw.reshape(*shape[:-1], 2 * shape[-1])
    return raw.view(np.float32 if type == F32 else np.float16).reshape(shape)


ORIGIN_FILE, ORIGIN_KEY = "cnq_merge.json", "cnq.merge"  # in a directory; in a GGUF


@dataclass(frozen=True)
class Origin:
    """What was merged into a model: the content of cnq_merge.json, and of a GGUF's cnq.merge.

    planned: the record as far as it is known before the tensors are read; digests not known yet are zeros.
    seal: the record, once every tensor has been read. Of a merge under way it raises CheckpointError when the merge changed
    nothing, or the base was not the one that an adapter names.
    """

    planned: dict[str, Any]
    seal: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, under Hugging Face's tensor names.

    path: what the user named.
    config: as config.json, with vocab_size = rows of the embedding.
    entries: name -> Entry, in the files' order, which becomes the GGUF's.
    read: name -> the tensor, memory-mapped.
    tokenizer: scratch directory -> directory with tokenizer files (the scratch, when they had to be made).
    notes: what was put right on the way, for the user to know.
    origin: what was merged into it, as far as cnq did it.
    """

    path: Path
    arch: Arch
    config: Config
    entries: dict[str, Entry]
    read: Callable[[str], Tensor]
    tokenizer: Callable[[Path], Path]
    notes: tuple[str, ...] = ()
    origin: Origin | None = None

    def placed(self) -> dict[str, list[Link]]:
        """GGUF name -> what it is made of, one link or one for each expert, in file order.

        Raises CheckpointError naming tensors that are missing, unknown, or of another shape than config.json says.
        """
        config = "config.json" if self.path.is_dir() else "its metadata"
        expected = self.arch.expected(self.config)
        missing = [name for name in expected if name not in self.entries]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(expected)} tensors are missing: {listed(missing)}. "
                f"The download is incomplete, or {config} is of another model."
            )
        unknown = [name for name in self.entries if name not in expected]
        if unknown:
            raise CheckpointError(
                f"{self.path}: tensors that {self.arch.classes[0]} does not have: {listed(unknown)}. "
                f"The model is a variant that cnq does not know, or {config} is of another model."
            )
        for name, shape in expected.items():
            require_shape(self.path, name, self.entries[name].shape, shape, config)
        by_hf = grouped(self.arch.links(self.config), "hf")
        placed = grouped((link for name in self.entries for link in by_hf[name]), "gguf")
        return {name: sorted(links, key=lambda link: link.expert or 0) for name, links in placed.items()}


def require_shape(path: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...], config: str) -> None:
    """Raise CheckpointError for a tensor of another shape than `config`, as the user knows it, says."""
    if found != expected:
        raise CheckpointError(
            f"{path}: {name} is {found}, by {config} it should be {expected}. "
            f"Weights and {config} are of different models: get both from one place."
        )


def write_origin(checkpoint: Checkpoint, folder: Path) -> None:
    """Write cnq_merge.json, if the checkpoint has an origin, into a directory that holds all its tensors. See Origin.seal."""
    if checkpoint.origin:
        text = json.dumps(checkpoint.origin.seal(), indent=2, ensure_ascii=False)
        (folder / ORIGIN_FILE).write_text(text, encoding="utf-8", errors="replace")

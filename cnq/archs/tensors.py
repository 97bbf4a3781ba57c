"""The words for where a family's tensors go: renamed, reordered, unpacked or stacked, and all of it undone again."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Config = dict[str, Any]


@dataclass(frozen=True)
class To:
    """Where a Hugging Face tensor, or its share of a packed one, goes in the GGUF.

    name: GGUF name, {} = layer.
    shape: sizes by letter: V vocabulary, D hidden, F feed-forward, H one head, Q query heads x head size, K key-value heads
    x head size, E experts.
    rope_heads: the config key that counts the heads whose rows are reordered for rotary attention.
    when: the config flag that brings the tensor into being; None = always there.
    unit_rows: whether, by the config, the model divides every row by its length before use; the GGUF gets them divided.
    float32: a matrix that llama.cpp wants in float32, as it does all vectors.
    """

    name: str
    shape: str
    rope_heads: str | None = None
    when: str | None = None
    unit_rows: Callable[[Config], bool] | None = None
    float32: bool = False


@dataclass(frozen=True)
class Packed:
    """A Hugging Face tensor that holds the rows of several GGUF tensors.

    parts: in the order of their rows. groups: the config key that counts the groups of rows; each group has its share of
    the first part, then of the second, and so on. None = one group.
    """

    parts: tuple[To, ...]
    groups: str | None = None


# HF name -> what becomes of it. A first {} in the name is the layer; a second one is the expert, and the tensors of a
# layer's experts are stacked, in order, into one GGUF tensor with the experts as its first dimension.
Tensors = Mapping[str, To | Packed]


@dataclass(frozen=True)
class Link:
    """One Hugging Face tensor, or some of its rows, is one GGUF tensor, or one expert of it.

    shape: of what is linked. groups, rows: in each of the groups that the HF tensor's rows fall into, which rows (from, to)
    are meant; None = all. heads: how many heads' rows are reordered, 0 = none. expert: the index in the GGUF tensor's first
    dimension. unit_rows, float32: as in To.
    """

    hf: str
    gguf: str
    shape: tuple[int, ...]
    groups: int = 1
    rows: tuple[int, int] | None = None
    heads: int = 0
    expert: int | None = None
    unit_rows: bool = False
    float32: bool = False

    def forward(self, data: np.ndarray) -> np.ndarray:
        """HF rows -> GGUF rows. Rows are moved whole, so any storage type will do; a plain rename returns `data` itself.

        HF's rotary attention turns the halves of a head against each other, llama.cpp's `llama` adjacent pairs:
        per head (2, d/2) rows become (d/2, 2). It is the inverse of `permute` in transformers'
        convert_llama_weights_to_hf.py.
        """
        row = data.shape[1:]
        if self.rows is not None:
            first, last = self.rows
            data = data.reshape(self.groups, -1, *row)[:, first:last].reshape(-1, *row)
        if self.heads:
            data = data.reshape(self.heads, 2, -1, *row).swapaxes(1, 2).reshape(data.shape)
        return data

    def back(self, data: np.ndarray) -> np.ndarray:
        """GGUF rows -> HF rows; those of a packed tensor are put together by `pack`."""
        if self.heads:
            data = data.reshape(self.heads, -1, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        return data


def grouped(links: Iterable[Link], side: Literal["hf", "gguf"]) -> dict[str, list[Link]]:
    """The links by the name that they have on one side, in their order."""
    found: dict[str, list[Link]] = {}
    for link in links:
        found.setdefault(getattr(link, side), []).append(link)
    return found


def gguf_shape(links: Sequence[Link]) -> tuple[int, ...]:
    """The shape of the GGUF tensor that the links, all to it, make up."""
    shape = links[0].shape
    return shape if links[0].expert is None else (len(links), *shape)


def pack(parts: Sequence[np.ndarray], groups: int) -> np.ndarray:
    """The rows of all parts in one, group by group: what Link.forward took apart."""
    row = parts[0].shape[1:]
    return np.concatenate([part.reshape(groups, -1, *row) for part in parts], axis=1).reshape(-1, *row)


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows (n, D) of float32, each divided by its length.

    Source: torch.nn.functional.normalize, which does not let the divisor fall below 1e-12.
    """
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.float32(1e-12))

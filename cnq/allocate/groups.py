"""Which tensors are taken to be alike: those of one role in one third of the depth, and each of the model's ends by itself."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..engine.weights import LOOKUP, PRODUCT
from ..gguf_file import TensorInfo

ENDS = ("token_embd", "output")
_MATRIX = re.compile(r"blk\.(\d{1,6})\.(.+)\.weight")
_THIRDS = ("first", "middle", "last")


def place(tensor: TensorInfo) -> tuple[str, int | None] | None:
    """Where a matrix stands: (role, layer), (name, None) at the model's ends; None for norms, biases and the like."""
    if len(tensor.shape) < 2:
        return None
    if m := _MATRIX.fullmatch(tensor.name):
        return m[2], int(m[1])
    name = tensor.name.removesuffix(".weight")
    return (name, None) if name in ENDS else None


@dataclass(frozen=True, order=True)
class Part:
    """One use of a tensor. With tied embeddings token_embd has two: its rows are looked up, and the head multiplies with it."""

    tensor: str
    use: str

    def __str__(self) -> str:
        return self.tensor if self.use == PRODUCT else f"{self.tensor} ({self.use})"


def parts(name: str, tied: bool) -> tuple[Part, ...]:
    """tied: whether the model has no output.weight of its own."""
    if name != "token_embd.weight":
        return (Part(name, PRODUCT),)
    return (Part(name, LOOKUP), Part(name, PRODUCT)) if tied else (Part(name, LOOKUP),)


def role_of(group: str) -> str:
    return group.partition(" ")[0]


def layer_of(part: Part) -> int | None:
    m = _MATRIX.fullmatch(part.tensor)
    return int(m[1]) if m else None


def grouped(tensors: Iterable[TensorInfo], tied: bool) -> dict[str, list[Part]]:
    """Group -> its parts, e.g. "ffn_down middle", in the order of the file; every matrix is in one, or in two with two uses."""
    placed = [(t, place(t)) for t in tensors]
    n_layers = 1 + max((where[1] for _, where in placed if where and where[1] is not None), default=0)
    groups: dict[str, list[Part]] = {}
    for tensor, where in placed:
        role, layer = where or (tensor.name, None)
        if layer is None:
            for part in parts(tensor.name, tied):
                groups[str(part).replace(".weight", "")] = [part]
        else:
            groups.setdefault(f"{role} {_THIRDS[3 * layer // n_layers]}", []).append(Part(tensor.name, PRODUCT))
    return groups

"""Which types a tensor may become, how many bytes it then takes, and the bounds of what a file can be."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from ..errors import QuantizeError, listed
from ..files import decimal
from ..gguf_file import TYPE_BY_NAME, GgufFile, TensorInfo, TensorType, padded
from ..quantize import Plan

# Those with blocks of 32 are no better for the weights than K-types of their size, but for the inputs: see rows.rounded_inputs.
USUAL = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "IQ4_NL", "Q4_1", "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0")
COARSE = ("IQ3_XXS", "IQ3_S")  # ten times slower to quantize to, and slow to run on a CPU: for the smallest sizes
COARSE_BELOW = 3.6  # bits per weight
NARROW = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # blocks of 32, for rows that no block of 256 divides
_NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})


@dataclass(frozen=True)
class Space:
    """What can be chosen: candidates of each tensor that llama.cpp quantizes, in its order. rest: bytes of the file besides."""

    file: GgufFile
    candidates: dict[str, tuple[TensorType, ...]]
    rest: int

    def nbytes(self, name: str, type: TensorType) -> int:
        """In the file, the gap to the next tensor included."""
        shape = self.file.tensors[name].shape
        return padded(prod(shape[:-1]) * type.row_bytes(shape[-1]), self.file.alignment)

    def total(self, types: dict[str, str]) -> int:
        return self.rest + sum(self.nbytes(name, TYPE_BY_NAME[type]) for name, type in types.items())

    @property
    def limits(self) -> tuple[int, int]:
        """Bytes of the smallest and of the largest file."""
        sizes = [[self.nbytes(name, type) for type in types] for name, types in self.candidates.items()]
        return self.rest + sum(map(min, sizes)), self.rest + sum(map(max, sizes))

    def require(self, budget: int) -> None:
        """Raise QuantizeError, with both limits, for a budget that no choice meets or that all choices leave unused."""
        least, most = self.limits
        if least <= budget <= most:
            return
        told = {t.name for types in self.candidates.values() for t in types}
        what = "smaller than the smallest" if budget < least else "larger than the largest"
        weights = self.file.n_params
        raise QuantizeError(
            f"{budget} bytes ({decimal(budget)}) are {what} file that {listed(sorted(told), 12)} can make of {self.file.path}: "
            f"from {least} ({decimal(least)}, {least * 8 / weights:.2f} bits per weight) to {most} ({decimal(most)}, "
            f"{most * 8 / weights:.2f}). Give a size between, or other --types."
        )


def space(file: GgufFile, stock: Plan, allowed: Sequence[str], important: frozenset[str]) -> Space:
    """stock: llama.cpp's plan for any quantized type, which tells the tensors that it quantizes. allowed: names of types.

    important: names of the tensors that have importance data; without, some types are no candidates.
    Raises QuantizeError for unknown types, and for a tensor that none of them can hold.
    """
    if unknown := [name for name in allowed if name not in TYPE_BY_NAME]:
        raise QuantizeError(f"unknown tensor type {listed(unknown)}; usual ones are {', '.join(USUAL)}.")
    candidates = {}
    taken = 0
    for t in stock.tensors:
        if t.type == t.from_type and not t.wanted:
            continue  # norms and vectors, which llama.cpp leaves alone
        taken += padded(t.nbytes, file.alignment)
        candidates[t.name] = _fitting(file.tensors[t.name], allowed, t.name in important)
    return Space(file, candidates, stock.nbytes - taken)


def fixed(room: Space, wishes: Sequence[tuple[str, str]]) -> Space:
    """The same where some tensors have no choice. wishes: (regular expression searched in the name, type); the first counts.

    Raises QuantizeError for an expression that finds none of the tensors, and for a type that does not fit its rows.
    """
    candidates = dict(room.candidates)
    for pattern, wish in reversed(wishes):
        try:
            names = [name for name in candidates if re.search(pattern, name)]
        except re.error as error:
            raise QuantizeError(f"--tensor-type {pattern}: not a regular expression ({error}).") from None
        type = TYPE_BY_NAME.get(wish)
        if not names or type is None:
            raise QuantizeError(f"--tensor-type {pattern}={wish}: no such tensor among those quantized, or no such type.")
        if bad := [name for name in names if room.file.tensors[name].shape[-1] % type.block]:
            raise QuantizeError(
                f"--tensor-type {pattern}={wish}: the rows of {listed(bad)} do not fill blocks of {type.block}."
            )
        candidates |= dict.fromkeys(names, (type,))
    return replace(room, candidates=candidates)


def _fitting(tensor: TensorInfo, allowed: Sequence[str], important: bool) -> tuple[TensorType, ...]:
    """Of the allowed types those whose blocks divide the rows. Where only one of them does, as Q8_0 does of the usual ones, or
    none, those with smaller blocks as well; else what the tensor is.
    """
    columns = tensor.shape[-1]

    def dividing(names: Sequence[str]) -> tuple[TensorType, ...]:
        types = [TYPE_BY_NAME[n] for n in names if important or n not in _NEED_IMPORTANCE]
        return tuple(t for t in types if columns % t.block == 0)

    found = dividing(allowed)
    if len(found) < min(2, len(allowed)):
        found = tuple(dict.fromkeys([*found, *dividing(NARROW)]))
    return found or (tensor.type,)


def allowed_types(wanted: Sequence[str], budget: int, file: GgufFile) -> tuple[str, ...]:
    """The types that may be used: those named, or the usual ones, with coarser ones for small budgets."""
    if wanted:
        return tuple(dict.fromkeys(name.upper() for name in wanted))
    return (*COARSE, *USUAL) if budget * 8 < COARSE_BELOW * file.n_params else USUAL


def beside(path: Path, ending: str) -> Path:
    """A file of the model's name with another ending."""
    return path.with_name(path.name.removesuffix(".gguf") + ending)

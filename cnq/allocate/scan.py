"""The error model: how far each tensor's outputs move when it is rounded to each type, for their own size.

For a matrix, E = Σ‖Ŵx̂ − Wx‖² / Σ‖Wx‖² over sampled rows and inputs x that calibration's statistics did not see: the rows are
rounded as the final run rounds them, and x̂ is x as llama.cpp rounds it for that type on this processor, so that a type is
charged for both. For a table that is looked up, E = Σ‖ê‖² / Σ‖w‖² over the tokens of the text. Layers scale their outputs
by many times, and each norm after them scales back: relative errors are alike in what they do, absolute ones are not.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np
from threadpoolctl import threadpool_limits

from ..engine import rows
from ..engine.weights import LOOKUP
from ..gguf_file import GgufFile, TensorType
from .groups import Part
from .rounding import Rounding, decoded


@dataclass(frozen=True)
class Error:
    """weight: what the rounding of the weights alone does to the output, output: with that of the inputs. Squares, relative."""

    weight: float
    output: float


Errors = dict[Part, dict[str, Error]]  # part -> type -> error


def scan(
    file: GgufFile,
    candidates: Mapping[Part, Sequence[TensorType]],
    inputs: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    rounding: Rounding,
    n_rows: int,
    threads: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Errors:
    """The errors of each part in each of its candidate types.

    inputs: tensor -> (tokens, columns), Sampler.inputs. tokens: of the text, which rows of the table were looked up.
    """

    found: Errors = {}
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        for part, types in candidates.items():
            error = (
                _looked_up(file, part.tensor, tokens, rounding, n_rows)
                if part.use == LOOKUP
                else _multiplied(file, part.tensor, types, inputs[part.tensor], rounding, n_rows)
            )
            # the types of one part side by side: compensation takes one and the same factor for all of them
            found[part] = dict(zip((t.name for t in types), pool.map(error, types), strict=True))
            progress(len(found), len(candidates))
    return found


def _sampled(file: GgufFile, name: str, n_rows: int) -> list[tuple[int, np.ndarray]]:
    """(matrix, its sampled rows (n, columns) float32); experts share `n_rows`, of each a few."""
    tensor = file.tensor(name)
    columns, height = tensor.shape[-1], tensor.shape[-2]
    n_mat = prod(tensor.shape[:-2])
    each = min(height, max(1, n_rows // n_mat))
    random = np.random.default_rng(zlib.crc32(name.encode()))
    taken = []
    for matrix in range(n_mat):
        chosen = np.sort(random.permutation(height)[:each])
        taken.append((matrix, decoded(tensor.rows()[matrix * height + chosen], tensor.type, columns)))
    return taken


def _multiplied(
    file: GgufFile, name: str, types: Sequence[TensorType], x: np.ndarray, rounding: Rounding, n_rows: int
) -> Callable[[TensorType], Error]:
    sampled = _sampled(file, name, n_rows)
    exact = [values @ x.T for _, values in sampled]
    power = sum(map(_squares, exact)) or 1.0
    rounded = {form: rows.rounded_inputs(x, type) for form, type in {rows.input_type(t): t for t in types}.items()}

    def error(type: TensorType) -> Error:
        weight, output = 0.0, 0.0
        for (matrix, values), outputs in zip(sampled, exact, strict=True):
            near = decoded(rounding.encoded(name, matrix, values, type), type, values.shape[1])
            weight += _squares((near - values) @ x.T)
            output += _squares(near @ rounded[rows.input_type(type)].T - outputs)
        return Error(weight / power, output / power)

    return error


def _looked_up(file: GgufFile, name: str, tokens: np.ndarray, rounding: Rounding, n_rows: int) -> Callable[[TensorType], Error]:
    """Over the rows of so many tokens of the text, as often as they occur."""
    table = file.tensor(name)
    random = np.random.default_rng(zlib.crc32(name.encode()))
    chosen = random.permutation(tokens.ravel())[: 4 * n_rows]
    ids, counts = np.unique(chosen, return_counts=True)
    values = decoded(table.rows()[ids], table.type, table.shape[-1])
    power = float(counts @ np.square(values).sum(1, dtype=np.float64)) or 1.0

    def error(type: TensorType) -> Error:
        near = decoded(rounding.encoded(name, 0, values, type), type, values.shape[1])
        lost = float(counts @ np.square(near - values).sum(1, dtype=np.float64)) / power
        return Error(lost, lost)

    return error


def _squares(a: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", a, a, dtype=np.float64))


def extrapolated(plain: Errors, compensated: Errors, groups: Mapping[str, Sequence[Part]]) -> Errors:
    """The errors under compensated rounding of all parts, from plain ones of all and compensated ones of some in each group.

    What compensation leaves of a weight's error is alike within a group; it is taken from the group's measured parts.
    """
    found = dict(plain)
    for group in groups.values():
        measured = [part for part in group if part in compensated]
        for part in group:
            if part in compensated:
                found[part] = compensated[part]
                continue
            for type, error in plain[part].items() if measured else ():
                before = sum(plain[m][type].weight for m in measured)
                share = sum(compensated[m][type].weight for m in measured) / before if before else 1.0
                weight = error.weight * share
                found[part] = found[part] | {type: Error(weight, max(0.0, error.output - error.weight) + weight)}
    return found

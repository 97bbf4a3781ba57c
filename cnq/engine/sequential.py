"""Rounding with compensation layer by layer: each layer makes up for the errors of the layers before it, as far as it can see.

Most of the error at a layer's output comes with its input. With x the input in the float model and x̂ in the model that is
rounded up to here, W′ x̂ is as near to W x as can be for

    W′ = W + W · E[(x − x̂) x̂ᵀ] · E[x̂ x̂ᵀ]⁻¹

(GPTAQ, arXiv 2504.02692; QEP, arXiv 2504.09629), and W′ is rounded, by E[x̂ x̂ᵀ]. What a matrix writes is added to the hidden
states in the end; where these are off already, by r, that is made up for too: + E[r x̂ᵀ] · E[x̂ x̂ᵀ]⁻¹.

The text runs through both models side by side, a layer at a time (layer.py): through a layer of the float model once, of the
other as far as the input of each of its matrices, and once to its end.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from ..errors import QuantizeError
from ..gguf_file import TensorType
from ..hessian_file import SKETCH, add_outer, add_product, is_held, packed_size, signs, unpacked
from . import rows
from .compensate import Hessian
from .compensation import Compensation, Result, compensated, plain
from .layer import Layer
from .quantizer import DAMPING, Outcome

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_STATES, _BETWEEN = "l_out-0", "ffn_inp-0"  # llama.cpp's names for the hidden states behind a layer, and behind its attention
_BEFORE = "before"  # ours for those that come in
_ADDED_TO = {"attn_output.weight": _BEFORE, "ffn_down.weight": _BETWEEN}  # the states that a product is added to
_PANEL = 256  # columns of a sum that a thread works on at once
_FAINT, _TINY = 1e-2, 1e-12  # of the median token's mean square: no token counts as if it had less, such as one never trained
_ALIKE = 1e-2  # share by which an input's mean squares may differ between the float model and its layers alone


@dataclass(frozen=True)
class _Sums:
    """What is known of an input from the text: x in the float model, x̂ in the rounded one, both with d columns.

    hessian: of x̂. Where states: for the one matrix W whose product is added to hidden states that are off by r, cross:
    Σ (W x + r − W x̂) x̂ᵀ, (n, d), and exact: W x + r of the chunks held back, as the sketch in hessian has x̂. Else for all
    matrices with this input, cross: Σ (x − x̂) x̂ᵀ, (d, d), and exact: x.
    """

    hessian: Hessian
    cross: np.ndarray
    exact: np.ndarray
    states: bool

    def target(self, weights: np.ndarray) -> np.ndarray:
        """What weights (n, d) should make of x̂ in the sketch: (SKETCH, n)."""
        return self.exact if self.states else self.exact @ weights.T

    def moved(self, weights: np.ndarray, correction: np.ndarray, pool: Executor) -> np.ndarray:
        """Those that do it. correction: cross · H⁻¹."""
        return weights + (correction if self.states else _product(weights, correction, pool))

    def loss(self, data: np.ndarray, type: TensorType, target: np.ndarray) -> float:
        """Mean square of what rounded rows make of x̂ instead."""
        decoded = rows.decode(data, type, np.empty(len(data) * self.hessian.held.shape[1], np.float32))
        wrong = target - self.hessian.held @ decoded.T
        return float(np.einsum("ij,ij->", wrong, wrong, dtype=np.float64)) / self.hessian.n_held


class LayerByLayer:
    """The compensated part of a quantization, in the order of the model."""

    def __init__(self, rest: Compensation, written: Callable[[str], np.ndarray], folder: Path):
        """rest: the same without regard to earlier layers, which rounds what has none before it, and experts. written: the
        bytes of a tensor in the rounded file, once they are there. folder: for files in between.

        Raises StatisticsError when the statistics' text is not there.
        """
        self._rest, self._written, self._folder = rest, written, folder
        self._file, self._types, self._inputs = rest.file, rest.types, rest.statistics.inputs
        self._tokens = rest.statistics.tokens()
        # Where a product is normalized or scaled before it is added, what it should make up for is another thing.
        plainly = f"{rest.file.arch}.residual_scale" not in rest.file.fields and not any(
            "post_" in n for n in rest.file.tensors
        )
        self._added_to = _ADDED_TO if plainly else {}

    def run(self, threads: int, begin: Callable[[str], object]) -> Iterator[Result]:
        """Round all the matrices; each must be in the file before the next is asked for.

        Memory, beside what compensation takes: the hidden states of the text in both models, two sums of an input, and a
        layer. Disk: between_bytes. Raises QuantizeError, StatisticsError, EngineError, OSError.
        """
        n_layers = int(self._file.fields[f"{self._file.arch}.block_count"])
        layers = [self._numbers(layer, n_layers) for layer in range(n_layers)]
        own = set().union(*layers)
        yield from self._rest.not_tried()
        if not self._rest.names:
            return
        for number in range(len(self._inputs)):
            if number not in own:
                yield from self._rest.rounded(number, threads, begin)
        stored = self._file.tensor(_EMBEDDING)
        self._exact = self._embedded(stored.rows().view(np.uint8), stored.type)
        self._rough = self._embedded(self._rounded(_EMBEDDING), self._types[_EMBEDDING])
        with ThreadPoolExecutor(threads) as pool:
            for layer, numbers in enumerate(layers):
                yield from self._layer(layer, numbers, layer + 1 == n_layers, pool, threads, begin)

    def _numbers(self, layer: int, n_layers: int) -> list[int]:
        """Of the inputs that a layer has, in the order of the graph; the output goes with the last."""
        ends = {_OUTPUT} if layer + 1 == n_layers else set()
        firsts = [one.weights[0] for one in self._inputs]
        return [n for n, name in enumerate(firsts) if name.startswith(f"blk.{layer}.") or name in ends]

    def _embedded(self, table: np.ndarray, type: TensorType) -> np.ndarray:
        """Hidden states of the text where it comes in: (chunks, n_ctx, hidden size) float32."""
        used, places = np.unique(self._tokens, return_inverse=True)
        values = np.empty(len(used) * self._file.tensors[_EMBEDDING].shape[1], np.float32)
        return rows.decode(np.ascontiguousarray(table[used]), type, values)[places.reshape(self._tokens.shape)]

    def _rounded(self, name: str) -> np.ndarray:
        """A tensor's rows in the rounded file: (rows, bytes)."""
        return self._written(name).reshape(-1, self._types[name].row_bytes(self._file.tensors[name].shape[-1]))

    def _layer(
        self, layer: int, numbers: list[int], last: bool, pool: Executor, threads: int, begin: Callable[[str], object]
    ) -> Iterator[Result]:
        seen = self._run_exact(layer, numbers, threads)
        later = {name for n in numbers for name in self._inputs[n].weights} & self._rest.names
        with self._alone(layer, self._types, lambda name: None if name in later else self._rounded(name), threads) as rough:
            rough.locate(sorted(later - {_OUTPUT}))
            for weights, own in groupby(numbers, lambda n: self._inputs[n].weights):
                for n in own:  # several are those of experts
                    if self._inputs[n].expert is None and self._inputs[n].enough:
                        yield from self._fitted(n, seen, rough, pool, threads, begin)
                    else:
                        yield from self._rest.rounded(n, threads, begin)
                for name in later.intersection(weights) - {_OUTPUT}:
                    rough.write(name, self._written(name))
            for k, states in enumerate(() if last else self._rough):
                self._rough[k] = rough.through(states, [], [_STATES])[_STATES]

    def _alone(self, layer: int, types: dict[str, TensorType], data: Callable[[str], np.ndarray | None], threads: int) -> Layer:
        n_ctx = self._tokens.shape[1]
        return Layer(self._file, layer, types, data, self._folder / "layer.gguf", n_ctx=n_ctx, threads=threads)

    def _run_exact(self, layer: int, numbers: list[int], threads: int) -> dict[str, np.ndarray]:
        """The text through a layer of the float model: of each input, by its first weight, (chunks, n_ctx, columns) float32,
        and the states that products are added to."""
        columns = {one.weights[0]: one.columns for n in numbers if (one := self._inputs[n]).expert is None}
        states = dict.fromkeys((_BEFORE, _BETWEEN), self._exact.shape[-1])
        seen: dict[str, np.ndarray] = {}
        squares = {name: np.zeros(wide) for name, wide in columns.items()}
        path = self._folder / "inputs.f32"
        for name, wide in (columns | states).items():
            shape = (*self._tokens.shape, wide)
            seen[name] = np.memmap(path, np.float32, "w+", shape=shape)
            path.unlink()  # the disk is free again when the array is, whatever becomes of this process
        types = {name: t.type for name, t in self._file.tensors.items()}
        with self._alone(layer, types, lambda name: self._file.tensor(name).data, threads) as exact:
            for k, before in enumerate(self._exact):
                found = exact.through(before, list(columns), [_BETWEEN, _STATES])
                seen[_BEFORE][k] = before
                self._exact[k] = found.pop(_STATES)
                for name, values in found.items():
                    seen[name][k] = values
                    if name in squares and not is_held(k):
                        squares[name] += np.square(values).sum(0, dtype=np.float64)
        for n in numbers:
            if self._inputs[n].expert is None:
                self._require_alike(n, squares[self._inputs[n].weights[0]])
        return seen

    def _require_alike(self, number: int, found: np.ndarray) -> None:
        """A layer alone must compute what it does in the whole model: an input has the sums of squares that were collected."""
        expected = np.diag(self._rest.statistics.read(number).fit).astype(np.float64)
        differs, whole = np.abs(found - expected).sum(), expected.sum()
        if not differs <= _ALIKE * whole:
            raise QuantizeError(
                f"{self._file.path}: its layers, run one by one, compute something else than the whole model (the inputs of "
                f"{self._inputs[number].name} differ by {differs / whole:.0%}). Round without: --rounding compensated"
            )

    def _fitted(
        self, number: int, seen: dict[str, np.ndarray], rough: Layer, pool: Executor, threads: int,
        begin: Callable[[str], object],
    ) -> Iterator[Result]:  # fmt: skip
        forms: dict[TensorType, list[str]] = {}  # in which products see the input
        for name in self._inputs[number].weights:
            if name in self._rest.names:
                forms.setdefault(rows.input_type(self._types[name]), []).append(name)
        for names in forms.values():
            yield from self._fitted_alike(number, names, seen, rough, pool, threads, begin)

    def _fitted_alike(
        self, number: int, names: list[str], seen: dict[str, np.ndarray], rough: Layer, pool: Executor, threads: int,
        begin: Callable[[str], object],
    ) -> Iterator[Result]:  # fmt: skip
        sums = self._summed(names[0], number, seen, rough, pool)
        correction = _solved(sums.cross, sums.hessian, pool)
        for name in names:
            self._rest.began(name, begin)
            weights, importance, start = self._rest.matrix(name, 0)
            type, target = self._types[name], sums.target(weights)
            found = compensated(name, sums.moved(weights, correction, pool), type, importance, sums.hessian, threads)
            simple = plain(name, weights, type, importance).reshape(found.rows.shape)
            loss_plain, loss = (sums.loss(data, type, target) for data in (simple, found.rows))
            kept = loss < loss_plain
            yield (
                Outcome(
                    name, None, type.name, None, loss_plain, min(loss, loss_plain), kept, found.damping, found.by_diagonal
                ),
                start,
                found.rows if kept else simple,
            )  # fmt: skip

    def _summed(self, name: str, number: int, seen: dict[str, np.ndarray], rough: Layer, pool: Executor) -> _Sums:
        """Run the text through the rounded model as far as the input of a weight."""
        first, d = self._inputs[number].weights[0], self._inputs[number].columns
        added_to = self._added_to.get(first.split(".", 2)[-1])
        weights = self._rest.matrix(name, 0)[0] if added_to else None
        n = d if weights is None else len(weights)
        fit, cross = np.zeros(packed_size(d), np.float32), np.zeros((n, d), np.float32)
        exact, held = np.zeros((SKETCH, n), np.float32), np.zeros((SKETCH, d), np.float32)
        n_rows = [0, 0]
        for k, states in enumerate(self._rough):
            found = {_BEFORE: states} | rough.through(states, [first], [_BETWEEN] if added_to == _BETWEEN else [])
            x, y, off = seen[first][k], rows.rounded_inputs(found[first], self._types[name]), np.float32(0)
            if added_to:
                before, after = seen[added_to][k], seen[_BETWEEN][k] if added_to == _BEFORE else self._exact[k]
                # The next norm divides states by their length, and so it sees what is wrong with them.
                squares = np.square(after).mean(1, keepdims=True)
                share = 1 / np.sqrt(np.maximum(squares, _FAINT * np.median(squares) + _TINY))
                x, y, off = x * share, y * share, (before - found[added_to]) * share
            n_rows[is_held(k)] += len(x)
            if is_held(k):
                drawn = signs(k, len(x))
                add_product(exact, drawn, x if weights is None else _product(x, weights.T, pool) + off, pool)
                add_product(held, drawn, y, pool)
            else:
                add_outer(fit, y, pool)
                add_product(cross, x - y if weights is None else _product(x - y, weights.T, pool) + off, y, pool)
        return _Sums(Hessian(unpacked(fit, d), held, n_rows[0], n_rows[1]), cross, exact, weights is not None)


def _product(a: np.ndarray, b: np.ndarray, pool: Executor) -> np.ndarray:
    return np.concatenate(list(pool.map(lambda start: a[start : start + _PANEL] @ b, range(0, len(a), _PANEL))))


def _solved(cross: np.ndarray, hessian: Hessian, pool: Executor) -> np.ndarray:
    """cross · H⁻¹, H damped as for rounding: with its factor, H = A · diag(D) · Aᵀ."""
    from scipy.linalg import solve_triangular

    factor = hessian.factor(DAMPING, False, pool)

    def solve(start: int) -> np.ndarray:
        one = solve_triangular(factor.feedback, cross[start : start + _PANEL].T, unit_diagonal=True, check_finite=False)
        one /= factor.remains[:, None]
        return solve_triangular(factor.feedback, one, trans=1, unit_diagonal=True, check_finite=False).T

    return np.concatenate(list(pool.map(solve, range(0, len(cross), _PANEL))))

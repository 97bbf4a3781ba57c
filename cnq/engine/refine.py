"""Codes, scales and minima of rounded rows chosen again, one after the other, while that lowers the layer's error.

The error E of a row costs E H Eᵀ. With everything else fixed it is a parabola in the value of one column, in the scale and the
minimum of one group, and in the two half-precision factors of one block: each is set to the best number that can be stored
(coordinate descent; for codes alone: QuantEase, arXiv 2309.01885). No step raises the cost.
"""

from dataclasses import dataclass

import numpy as np

from .codes import Form, Scales
from .kernels import Grid, choose_again

_BLOCK = 256  # columns after which errors are handed on to the rest of a row


def block_width(columns: int) -> int:
    """Columns of a block: 256, or less in a row that is no multiple of it, which only types with blocks of 32 can store."""
    return int(np.gcd(columns, _BLOCK))


@dataclass(frozen=True)
class Rounded:
    """Rounded rows. weights: (n, d) float32; errors: (n, d), weights less their rounded values; codes: (n, d) uint8."""

    form: Form
    weights: np.ndarray
    errors: np.ndarray
    codes: np.ndarray
    grid: Grid

    @classmethod
    def read(cls, form: Form, weights: np.ndarray, data: np.ndarray) -> "Rounded":
        """data: (n, bytes per row)."""
        s = form.scales(data)
        groups = (len(weights), weights.shape[1] // form.group)
        # Where a block is one group its scale is 1. An offset is −dmin · min: where types add dmin, min is −1; 0 without.
        scales = np.ones(groups, np.float32) if s.scales is None else s.scales.astype(np.float32, order="C")
        mins = np.full(groups, 0 if s.dmin is None else -1, np.float32)
        if s.mins is not None:
            mins = s.mins.astype(np.float32, order="C")
        d = s.d.astype(np.float32, order="C")
        dmin = np.zeros_like(d) if s.dmin is None else s.dmin.astype(np.float32, order="C")
        grid = Grid(d, dmin, scales, mins, form.group, s.scales is not None, *form.scale_range)
        self = cls(form, weights, np.empty_like(weights), np.ascontiguousarray(form.codes(data)), grid)
        steps, offsets = (np.repeat(part, form.group, 1) for part in self.steps_and_offsets())
        np.subtract(weights, form.levels[self.codes] * steps + offsets, out=self.errors)
        return self

    def steps_and_offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """(n, groups) float32, of the values step · level + offset."""
        per_block = self.grid.scales.shape[1] // self.grid.d.shape[1]
        d, dmin = np.repeat(self.grid.d, per_block, 1), np.repeat(self.grid.dmin, per_block, 1)
        return d * self.grid.scales, -(dmin * self.grid.mins)

    def write(self, data: np.ndarray) -> None:
        """Into rows of the form."""
        s = self.form.scales(data)
        d, dmin = self.grid.d.astype(np.float16), None if s.dmin is None else self.grid.dmin.astype(np.float16)
        scales = None if s.scales is None else self.grid.scales.astype(s.scales.dtype)
        mins = None if s.mins is None else self.grid.mins.astype(s.mins.dtype)
        self.form.put_scales(data, Scales(d, dmin, scales, mins))
        self.form.put_codes(data, self.codes)


def sweep(rounded: Rounded, hessian: np.ndarray, ridge: np.ndarray) -> None:
    """Choose everything again once. hessian: (d, d) float32; ridge: (d,), what damping adds to its diagonal."""
    form, d = rounded.form, rounded.weights.shape[1]
    width = block_width(d)
    for start in range(0, d, width):
        own = slice(start, start + width)
        # (n, width): half of what the cost falls by as a value grows
        pull = rounded.errors @ hessian[:, own] + rounded.errors[:, own] * ridge[own]
        corner = hessian[own, own] + np.diag(ridge[own])
        sums = np.add.reduceat(corner, np.arange(0, width, form.group), 1)
        choose_again(
            rounded.weights, rounded.errors, rounded.codes, rounded.grid, pull, corner, sums, start, form.kernel_levels
        )

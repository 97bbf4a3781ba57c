"""The inner loops of compensated rounding, compiled by numba: one row of weights after the other, outside of Python's lock.

A value is step · level[code] + offset, with step = d · scale and offset = −dmin · min; d and dmin are a block's, scale and
min a group's. Arrays are contiguous and float32 where nothing else is said.
"""

import math
from collections.abc import Callable
from functools import wraps
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
from numba import njit

_LARGEST_HALF = 65504.0
_FLAT = 1e-5  # two directions that are so nearly one have no best point

# Sums may be taken in any order, so that vectors do; values are rounded step by step, as ggml rounds them.
_summing = njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
_exact = njit(nogil=True, error_model="numpy")


def _kept(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled with all that it calls, once for this machine: the code is kept beside this file, or in the user's cache."""
    plain = _exact(function)
    try:
        cached = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is no folder for it
        return plain

    @wraps(function)
    def call(*arguments: object) -> None:
        try:
            cached(*arguments)
        except (OSError, EOFError, UnpicklingError):  # of the kept code, before it runs: a full disk, a damaged file
            plain(*arguments)

    return call


class Levels(NamedTuple):
    """What codes stand for. at: by code, ascending. middles: between two of them; none where they are whole numbers in a row.
    first, last: codes that may be used."""

    at: np.ndarray
    middles: np.ndarray
    first: int
    last: int


class Grid(NamedTuple):
    """Where values of n rows can lie. d, dmin: (n, blocks). scales, mins: (n, groups), whole numbers. group: columns of one.

    changing: whether a group has a scale of its own, and a min where dmin is not 0, within low … high; else a block is one
    group, and they stay.
    """

    d: np.ndarray
    dmin: np.ndarray
    scales: np.ndarray
    mins: np.ndarray
    group: int
    changing: bool
    low: int
    high: int


@_summing
def _add(to: np.ndarray, factor: float, row: np.ndarray) -> None:
    for i in range(len(to)):
        to[i] += factor * row[i]


@_summing
def _dot(a: np.ndarray, b: np.ndarray) -> np.float32:
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@_exact
def half(x: float) -> float:
    """The nearest number in half precision, of two the even one; beyond the largest, the largest."""
    x = min(max(x, -_LARGEST_HALF), _LARGEST_HALF)
    exponent = max(math.frexp(x)[1], -13)
    return math.ldexp(np.rint(math.ldexp(x, 11 - exponent)), exponent - 11)


@_exact
def _nearest(moved: float, step: float, levels: Levels) -> int:
    """The code of the level nearest to moved / step. A step of 0 takes the first code, and so does what is no number."""
    first, last = levels.first, levels.last
    if step == 0:
        return first
    level = moved / step
    if not level > levels.at[first]:
        return first
    if not level < levels.at[last]:
        return last
    if len(levels.middles) == 0:
        return first + int(np.rint(level) - levels.at[first])
    code = first
    while code < last and level > levels.middles[code]:
        code += 1
    return code


@_kept
def feed_back(
    now: np.ndarray,
    original: np.ndarray,
    errors: np.ndarray,
    codes: np.ndarray,
    inside: np.ndarray,
    group: int,
    steps: np.ndarray,
    offsets: np.ndarray,
    within: np.ndarray,
    levels: Levels,
) -> None:
    """Round a block column by column, and hand the errors on.

    now, original: (n, width), the weights as the columns before have corrected them, and as they are. errors, and codes
    (uint8): (n, width), which are filled. inside: (width,), the columns' places in the block: `codes` goes by these, and so do
    steps, offsets: (n, groups); all else by the order of rounding. within: (width, width), of the factor.
    """
    for r in range(len(now)):
        for c in range(now.shape[1]):
            place = inside[c]
            step, offset = steps[r, place // group], offsets[r, place // group]
            code = _nearest(now[r, c] - offset, step, levels)
            error = original[r, c] - (levels.at[code] * step + offset)
            codes[r, place], errors[r, c] = code, error
            if error != 0:
                _add(now[r, c + 1 :], error, within[c, c + 1 :])


@_kept
def choose_again(
    weights: np.ndarray,
    errors: np.ndarray,
    codes: np.ndarray,
    grid: Grid,
    pull: np.ndarray,
    corner: np.ndarray,
    sums: np.ndarray,
    start: int,
    levels: Levels,
) -> None:
    """Set the codes, scales, minima and factors of some columns to the best there is, one after the other.

    weights, errors: (n, d); codes: (n, d) uint8. pull: (n, width), H times the errors; corner: (width, width), H of the columns
    from `start` on; sums: (width, groups), of its columns over each group.
    """
    n, width = pull.shape
    groups, per_block = width // grid.group, weights.shape[1] // grid.group // grid.d.shape[1]
    along = np.empty(width, np.float32)
    for r in range(n):
        w, e, k = weights[r, start : start + width], errors[r, start : start + width], codes[r, start : start + width]
        p = pull[r]
        for at in range(groups):
            g = start // grid.group + at
            own = range(at * grid.group, (at + 1) * grid.group)
            step, offset = _step_and_offset(grid, r, g, per_block)
            for i in own:
                code = _nearest(w[i] - e[i] + p[i] / corner[i, i] - offset, step, levels)
                if code != k[i]:
                    k[i] = code
                    _put(w, e, p, corner, i, levels.at[code] * step + offset)
            if grid.changing:
                changed = _integers(grid, r, g, per_block, at, k, p, corner, sums, levels, along)
            else:
                changed = _halves(grid, r, g, 1, per_block, at, k, p, corner, sums, levels, along)
            if changed:
                step, offset = _step_and_offset(grid, r, g, per_block)
                for i in own:
                    _put(w, e, p, corner, i, levels.at[k[i]] * step + offset)
        if grid.changing and _halves(grid, r, start // grid.group, groups, per_block, 0, k, p, corner, sums, levels, along):
            for i in range(width):
                step, offset = _step_and_offset(grid, r, (start + i) // grid.group, per_block)
                e[i] = w[i] - (levels.at[k[i]] * step + offset)


@_exact
def _step_and_offset(grid: Grid, r: int, g: int, per_block: int) -> tuple[float, float]:
    block = g // per_block
    return grid.d[r, block] * grid.scales[r, g], -(grid.dmin[r, block] * grid.mins[r, g])


@_exact
def _put(w: np.ndarray, e: np.ndarray, p: np.ndarray, corner: np.ndarray, i: int, value: float) -> None:
    """Give column i of a row another value; `p` follows."""
    error = w[i] - value
    if error != e[i]:
        _add(p, error - e[i], corner[i])
        e[i] = error


@_exact
def _integers(
    grid: Grid, r: int, g: int, per_block: int, at: int, k: np.ndarray, p: np.ndarray, corner: np.ndarray, sums: np.ndarray,
    levels: Levels, along: np.ndarray,
) -> bool:  # fmt: skip
    """A group's scale and min, to the best integers near the best numbers. Returns whether they changed.

    g: the group's number in the row; at: among these columns.
    """
    block = g // per_block
    d, dmin = grid.d[r, block], grid.dmin[r, block]
    for i in range(at * grid.group, (at + 1) * grid.group):
        along[i] = levels.at[k[i]] * d
    across = np.full(1, -dmin, np.float32)
    xx, xy, yy, x, y = _parabola(along, across, p, corner, sums, at, grid.group)
    exact, _ = _best(xx, xy, yy, x, y)
    scale, least = grid.scales[r, g], grid.mins[r, g]
    best, best_more, best_less = 0.0, 0.0, 0.0
    for nearby in range(-1, 3):
        more = min(max(np.floor(exact) + nearby, grid.low - scale), grid.high - scale)
        less = 0.0
        if yy > 0:
            less = min(max(np.rint((y - xy * more) / yy), grid.low - least), grid.high - least)
        change = more * (xx * more - 2 * x) + less * (yy * less + 2 * (xy * more - y))
        if change < best:
            best, best_more, best_less = change, more, less
    grid.scales[r, g] += best_more
    grid.mins[r, g] += best_less
    return best < 0


@_exact
def _halves(
    grid: Grid, r: int, g: int, groups: int, per_block: int, at: int, k: np.ndarray, p: np.ndarray, corner: np.ndarray,
    sums: np.ndarray, levels: Levels, along: np.ndarray,
) -> bool:  # fmt: skip
    """The d and dmin of a block, to the best numbers rounded to half precision. Returns whether they changed.

    g: the number of its first group in the row; at: among these columns. groups: how many it has.
    """
    block = g // per_block
    across = np.empty(groups, np.float32)
    for j in range(groups):
        across[j] = -grid.mins[r, g + j]
        for i in range((at + j) * grid.group, (at + j + 1) * grid.group):
            along[i] = levels.at[k[i]] * grid.scales[r, g + j]
    xx, xy, yy, x, y = _parabola(along, across, p, corner, sums, at, grid.group)
    more, less = _best(xx, xy, yy, x, y)
    d, dmin = np.float32(half(grid.d[r, block] + more)), np.float32(half(grid.dmin[r, block] + less))
    more, less = float(d - grid.d[r, block]), float(dmin - grid.dmin[r, block])
    if not more * (xx * more - 2 * x) + less * (yy * less + 2 * (xy * more - y)) < 0:
        return False
    grid.d[r, block], grid.dmin[r, block] = d, dmin
    return True


@_exact
def _parabola(
    along: np.ndarray, across: np.ndarray, p: np.ndarray, corner: np.ndarray, sums: np.ndarray, at: int, group: int
) -> tuple[float, float, float, float, float]:
    """What it costs when values move by s · along + t · across, from group `at` on: (xx, xy, yy, x, y) of the cost
    xx s² + 2 xy s t + yy t² − 2 x s − 2 y t.

    along: by column. across: (groups,), alike in each group's columns.
    """
    groups = len(across)
    first, last = at * group, (at + groups) * group
    xx = xy = yy = x = y = 0.0
    for i in range(first, last):
        weighed = _dot(corner[i, first:last], along[first:last])
        driven = _dot(sums[i, at : at + groups], across)
        own = across[(i - first) // group]
        xx += along[i] * weighed
        xy += along[i] * driven
        yy += own * driven
        x += along[i] * p[i]
        y += own * p[i]
    return xx, xy, yy, x, y


@_exact
def _best(xx: float, xy: float, yy: float, x: float, y: float) -> tuple[float, float]:
    """The s and t of the least cost; 0 where there is none."""
    if not yy > 0:
        return (x / xx if xx > 0 else 0.0), 0.0
    determinant = xx * yy - xy * xy
    if not determinant > _FLAT * xx * yy:
        return 0.0, 0.0
    return (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant

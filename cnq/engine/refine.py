"""Codes, scales and minima of rounded rows chosen again, one after the other, while that lowers the layer's error.

The error E of a row costs E H Eᵀ. With everything else fixed it is a parabola in the value of one column, in the scale and the
minimum of one group, and in the two half-precision factors of one block: each is set to the best number that can be stored
(coordinate descent; for codes alone: QuantEase, arXiv 2309.01885). No step raises the cost.
"""

from dataclasses import dataclass

import numpy as np

from .codes import Form, Scales

_LARGEST_HALF = 65504.0


def nearest(values: np.ndarray, step: np.ndarray, offset: np.ndarray | None, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """The codes of the nearest values that a group can hold, and those values. A step of 0 takes the first code."""
    first, last = form.usable
    levels = form.levels
    moved = values if offset is None else values - offset
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = moved / step
    if not step.all():
        scaled[step == 0] = levels[first]
    if form.uniform:
        level = np.rint(scaled, out=scaled)
        np.clip(level, levels[first], levels[last], out=level)
        code = (level - levels[0]).astype(np.uint8)
    else:
        code = np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled).astype(np.uint8)
        level = levels[code]
    level = level * step
    return code, level if offset is None else level + offset


@dataclass
class Rounded:
    """Rounded rows with columns first, as the inner loops go over them. Everything is (…, n) for n rows.

    weights: (d, n) float32. errors: (d, n), weights less their rounded values. codes: (d, n). d, dmin: (blocks, n) and scales,
    mins: (groups, n) float32, with the numbers that Scales has.
    """

    form: Form
    weights: np.ndarray
    errors: np.ndarray
    codes: np.ndarray
    d: np.ndarray
    dmin: np.ndarray | None
    scales: np.ndarray | None
    mins: np.ndarray | None

    @classmethod
    def read(cls, form: Form, weights: np.ndarray, data: np.ndarray) -> "Rounded":
        """weights: (d, n). data: (n, bytes per row)."""
        s = form.scales(data)
        turned = [None if a is None else np.ascontiguousarray(a.T, np.float32) for a in (s.d, s.dmin, s.scales, s.mins)]
        d, dmin, scales, mins = turned
        assert d is not None
        codes = np.ascontiguousarray(form.codes(data).T)
        self = cls(form, weights, np.empty_like(weights), codes, d, dmin, scales, mins)
        for group in range(len(weights) // form.group):
            self.renew(group)
        return self

    def write(self, data: np.ndarray) -> None:
        """Into rows of the form."""
        s = self.form.scales(data)
        d, dmin = self.d.T.astype(np.float16), None if self.dmin is None else self.dmin.T.astype(np.float16)
        scales = None if s.scales is None or self.scales is None else self.scales.T.astype(s.scales.dtype)
        mins = None if s.mins is None or self.mins is None else self.mins.T.astype(s.mins.dtype)
        self.form.put_scales(data, Scales(d, dmin, scales, mins))
        self.form.put_codes(data, np.ascontiguousarray(self.codes.T))

    def block(self, group: int) -> int:
        return group * len(self.d) // (len(self.weights) // self.form.group)

    def columns(self, group: int) -> slice:
        return slice(group * self.form.group, (group + 1) * self.form.group)

    def step(self, group: int) -> np.ndarray:
        d = self.d[self.block(group)]
        return d if self.scales is None else d * self.scales[group]

    def offset(self, group: int) -> np.ndarray | None:
        if self.dmin is None:
            return None
        dmin = self.dmin[self.block(group)]
        return dmin if self.mins is None else -(dmin * self.mins[group])

    def renew(self, group: int) -> None:
        """The group's errors, after its codes or scales have changed."""
        own = self.columns(group)
        values, offset = self.form.levels[self.codes[own]] * self.step(group), self.offset(group)
        self.errors[own] = self.weights[own] - (values if offset is None else values + offset)


def sweep(rounded: Rounded, hessian: np.ndarray, ridge: np.ndarray) -> None:
    """Choose everything again once. hessian: (d, d) float32; ridge: (d,), what damping adds to its diagonal."""
    form = rounded.form
    d = len(rounded.weights)
    width = int(np.gcd(d, 256))
    for start in range(0, d, width):
        own = slice(start, start + width)
        # (width, n): half of what the cost falls by as a value grows
        pull = hessian[own] @ rounded.errors + ridge[own, None] * rounded.errors[own]
        corner = hessian[own, own] + np.diag(ridge[own])
        for group in range(start // form.group, (start + width) // form.group):
            columns = rounded.columns(group)
            inside = slice(columns.start - start, columns.stop - start)
            before = rounded.errors[columns].copy()
            _codes(rounded, group, pull[inside], corner[inside, inside])
            slope = pull[inside] + corner[inside, inside] @ (rounded.errors[columns] - before)
            if _group(rounded, group, slope, corner[inside, inside]):
                rounded.renew(group)
            pull += corner[:, inside] @ (rounded.errors[columns] - before)
        if rounded.scales is not None and _block(rounded, rounded.block(start // form.group), own, pull, corner):
            for group in range(start // form.group, (start + width) // form.group):
                rounded.renew(group)


def _codes(rounded: Rounded, group: int, pull: np.ndarray, corner: np.ndarray) -> None:
    """Each code of a group in turn. pull: (group, n) when it begins."""
    columns = rounded.columns(group)
    step, offset = rounded.step(group), rounded.offset(group)
    changes = np.empty_like(pull)
    for i, c in enumerate(range(columns.start, columns.stop)):
        error = rounded.errors[c]
        here = pull[i] + corner[i, :i] @ changes[:i] if i else pull[i]
        wanted = rounded.weights[c] - error + here / corner[i, i]
        rounded.codes[c], value = nearest(wanted, step, offset, rounded.form)
        np.subtract(rounded.weights[c], value, out=value)
        np.subtract(value, error, out=changes[i])
        rounded.errors[c] = value


def _group(rounded: Rounded, group: int, pull: np.ndarray, corner: np.ndarray) -> bool:
    """A group's scale and minimum, or where it has a block of its own, its d and dmin. Returns whether any changed."""
    levels = rounded.form.levels[rounded.codes[rounded.columns(group)]]
    block = rounded.block(group)
    d, dmin = rounded.d[block], None if rounded.dmin is None else rounded.dmin[block]
    if rounded.scales is None:
        return _halves(d, dmin, levels, np.ones_like(levels), pull, corner)
    cost = _Cost(levels * d, None if dmin is None else np.broadcast_to(-dmin, levels.shape), pull, corner)
    low, high = rounded.form.scale_range
    now = rounded.scales[group]
    if rounded.mins is None:
        more = np.clip(np.rint(cost.best()[0]), low - now, high - now)
        return _accept(cost.change(more), (now, more))
    mins = rounded.mins[group]
    exact, _ = cost.best()
    best, best_more, best_less = np.zeros_like(now), np.zeros_like(now), np.zeros_like(now)
    for nearby in (-1, 0, 1, 2):
        more = np.clip(np.floor(exact) + nearby, low - now, high - now)
        less = np.clip(np.rint(cost.second(more)), low - mins, high - mins)
        change = cost.change(more, less)
        better = change < best
        best[better], best_more[better], best_less[better] = change[better], more[better], less[better]
    return _accept(best, (now, best_more), (mins, best_less))


def _block(rounded: Rounded, block: int, own: slice, pull: np.ndarray, corner: np.ndarray) -> bool:
    """The factors d and dmin of a block of groups."""
    assert rounded.scales is not None
    groups = slice(own.start // rounded.form.group, own.stop // rounded.form.group)
    values = rounded.form.levels[rounded.codes[own]] * np.repeat(rounded.scales[groups], rounded.form.group, 0)
    d, dmin = rounded.d[block], None if rounded.dmin is None else rounded.dmin[block]
    minus = None if rounded.mins is None else -np.repeat(rounded.mins[groups], rounded.form.group, 0)
    return _halves(d, dmin, values, minus, pull, corner)


def _halves(
    d: np.ndarray, dmin: np.ndarray | None, values: np.ndarray, ones: np.ndarray | None, pull: np.ndarray, corner: np.ndarray
) -> bool:
    """d and dmin, in place: the best, rounded to half precision. values, ones: what they are multiplied with, (columns, n)."""
    cost = _Cost(values, None if dmin is None else ones, pull, corner)
    more, less = cost.best()
    more = _to_half(d + more) - d
    if dmin is None:
        return _accept(cost.change(more), (d, more))
    less = _to_half(dmin + less) - dmin
    return _accept(cost.change(more, less), (d, more), (dmin, less))


def _to_half(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16).astype(np.float32)


def _accept(change: np.ndarray, *parts: tuple[np.ndarray, np.ndarray]) -> bool:
    """Add to each part what it may change by, in the rows whose cost falls."""
    better = change < 0
    for part, more in parts:
        part[better] += more[better]
    return bool(better.any())


class _Cost:
    """What it costs when values move by x · along + y · across; for each row the parabola of its own in x and y.

    along, across: (columns, n). pull: H E of those columns, corner: H of them.
    """

    def __init__(self, along: np.ndarray, across: np.ndarray | None, pull: np.ndarray, corner: np.ndarray):
        weighed = corner @ along
        self.xx, self.x = np.einsum("ij,ij->j", weighed, along), np.einsum("ij,ij->j", pull, along)
        self.yy = self.xy = self.y = np.zeros_like(self.x)
        if across is not None:
            self.xy, self.y = np.einsum("ij,ij->j", weighed, across), np.einsum("ij,ij->j", pull, across)
            self.yy = np.einsum("ij,ij->j", corner @ across, across)

    def change(self, x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
        cost = x * (self.xx * x - 2 * self.x)
        return cost if y is None else cost + y * (self.yy * y + 2 * (self.xy * x - self.y))

    def second(self, x: np.ndarray) -> np.ndarray:
        """The best y for an x."""
        return _ratio(self.y - self.xy * x, self.yy)

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """The x and y of the least cost; 0 where the parabola has no bottom."""
        if not self.yy.any():
            return _ratio(self.x, self.xx), np.zeros_like(self.x)
        both = self.xx * self.yy
        determinant = np.where(both - self.xy**2 > 1e-5 * both, both - self.xy**2, 0)
        return _ratio(self.x * self.yy - self.y * self.xy, determinant), _ratio(
            self.y * self.xx - self.x * self.xy, determinant
        )


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)

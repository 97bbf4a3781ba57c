"""Blocks of ggml's types taken apart and put together: what a row holds besides its numbers' codes, and the codes.

In every type here a value is step · level[code] + offset; a group of 16 or 32 columns has one step and one offset in common.
Layouts: ggml/src/ggml-common.h (block_q4_K and its like) and dequantize_row_* in ggml-quants.c, as llama-cpp-python 0.3.36
ships them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..errors import QuantizeError
from ..gguf_file import TYPE_BY_NAME, TensorType

if TYPE_CHECKING:
    from .kernels import Levels


@dataclass(frozen=True)
class Scales:
    """What the codes of n rows are multiplied with and moved by.

    d, dmin: (n, blocks) float16; dmin None where a type has no offset. scales, mins: (n, groups) integers that they are
    multiplied with, None where a block is one group.
    """

    d: np.ndarray
    dmin: np.ndarray | None
    scales: np.ndarray | None
    mins: np.ndarray | None

    def steps(self) -> np.ndarray:
        """(n, groups) float32: the factor of the levels, rounded as ggml rounds it."""
        return _times(self.d, self.scales)

    def offsets(self) -> np.ndarray | None:
        """(n, groups) float32: what is added; None: nothing."""
        if self.dmin is None:
            return None
        return self.dmin.astype(np.float32) if self.mins is None else -_times(self.dmin, self.mins)


def _times(d: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    d = d.astype(np.float32)
    if scales is None:
        return d
    groups = scales.shape[1] // d.shape[1]
    return (d[:, :, None] * scales.reshape(len(d), -1, groups)).reshape(scales.shape)


@dataclass(frozen=True)
class _Bits:
    """Where bits of the codes lie: `bits` of each, which go up by `shift`, in `nbytes` bytes from `start`.

    The bytes fall into `chunks`; a chunk of w bytes holds w codes in its lowest bits, the next w in the bits above, and so on.
    """

    start: int
    nbytes: int
    chunks: int
    bits: int
    shift: int = 0

    def read(self, blocks: np.ndarray) -> np.ndarray:
        """(m, codes) uint8 from (m, size) bytes."""
        raw = blocks[:, self.start : self.start + self.nbytes].reshape(len(blocks), self.chunks, 1, -1)
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]
        return (((raw >> shifts) & ((1 << self.bits) - 1)) << self.shift).reshape(len(blocks), -1)

    def write(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        planes = 8 // self.bits
        parts = codes.reshape(len(blocks), self.chunks, planes, -1)
        raw = np.zeros((len(blocks), self.chunks, parts.shape[-1]), np.uint8)
        for plane in range(planes):
            raw |= ((parts[:, :, plane] >> self.shift) & ((1 << self.bits) - 1)) << (plane * self.bits)
        blocks[:, self.start : self.start + self.nbytes] = raw.reshape(len(blocks), -1)


_Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
_Write = Callable[[np.ndarray, np.ndarray, np.ndarray | None], None]


@dataclass(frozen=True)
class Form:
    """A type's blocks. group: columns with a step in common. levels: what a code stands for, ascending.

    usable: the codes that products with the type compute correctly, (first, last): all of them but -128 in Q8_0, whose sign
    cannot be turned in a byte. scale_range: the least and the greatest integer of a group; both 0 where it has none.
    """

    type: TensorType
    group: int
    levels: np.ndarray
    usable: tuple[int, int]
    scale_range: tuple[int, int]
    _d: int
    _dmin: int | None
    _bits: tuple[_Bits, ...]
    _read: _Read | None = None
    _write: _Write | None = None

    @cached_property
    def kernel_levels(self) -> "Levels":
        """The levels as the kernels take them. Whole numbers in a row need no middles: rounding finds the nearest."""
        from .kernels import Levels  # a compiler comes with it

        in_a_row = bool((np.diff(self.levels) == 1).all())
        middles = np.empty(0, np.float32) if in_a_row else (self.levels[1:] + self.levels[:-1]) / 2
        return Levels(self.levels, middles, *self.usable)

    def scales(self, data: np.ndarray) -> Scales:
        """data: (n, bytes per row) uint8."""
        blocks, n = self._blocks(data), len(data)
        scales = mins = None
        if self._read:
            found = self._read(blocks)
            scales, mins = (None if part is None else part.reshape(n, -1) for part in found)
        dmin = None if self._dmin is None else _half(blocks, self._dmin).reshape(n, -1)
        return Scales(_half(blocks, self._d).reshape(n, -1), dmin, scales, mins)

    def codes(self, data: np.ndarray) -> np.ndarray:
        """(n, columns) uint8, as indices of `levels`."""
        blocks = self._blocks(data)
        codes = self._bits[0].read(blocks)
        for bits in self._bits[1:]:
            codes |= bits.read(blocks)
        return (codes ^ self._flip).reshape(len(data), -1)

    def put_codes(self, data: np.ndarray, codes: np.ndarray) -> None:
        """Other codes in the same rows. data: contiguous."""
        blocks = self._blocks(data)
        codes = codes.reshape(len(blocks), -1) ^ self._flip
        for bits in self._bits:
            bits.write(blocks, codes)

    def put_scales(self, data: np.ndarray, to: Scales) -> None:
        """Other scales in the same rows, of the kinds that `scales` gives. data: contiguous."""
        blocks = self._blocks(data)
        _put_half(blocks, self._d, to.d)
        if self._dmin is not None and to.dmin is not None:
            _put_half(blocks, self._dmin, to.dmin)
        if self._write and to.scales is not None:
            mins = None if to.mins is None else to.mins.reshape(len(blocks), -1)
            self._write(blocks, to.scales.reshape(len(blocks), -1), mins)

    def _blocks(self, data: np.ndarray) -> np.ndarray:
        return data.reshape(-1, self.type.size)

    @property
    def _flip(self) -> np.uint8:
        """Q8_0 stores signed bytes: with the sign turned they ascend."""
        return np.uint8(0x80 if self._bits[0].bits == 8 else 0)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _put_half(blocks: np.ndarray, at: int, values: np.ndarray) -> None:
    blocks[:, at : at + 2] = np.ascontiguousarray(values, np.float16).reshape(-1, 1).view(np.uint8)


# Scales of the groups in a block, of each type as it packs them.


def _read_q2(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    raw = blocks[:, :16]
    return raw & 15, raw >> 4


def _write_q2(blocks: np.ndarray, scales: np.ndarray, mins: np.ndarray | None) -> None:
    assert mins is not None
    blocks[:, :16] = scales.astype(np.uint8) | mins.astype(np.uint8) << 4


def _read_q3(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    """Sixteen of 6 bits, less 32: the low four bits of 0-7 and 8-15 in nibbles, the high two by four in the last bytes."""
    low = _Bits(96, 8, 1, 4).read(blocks)
    return (low | _Bits(104, 4, 1, 2, 4).read(blocks)).astype(np.int8) - 32, None


def _write_q3(blocks: np.ndarray, scales: np.ndarray, mins: np.ndarray | None) -> None:
    codes = (scales + 32).astype(np.uint8)
    _Bits(96, 8, 1, 4).write(blocks, codes)
    _Bits(104, 4, 1, 2, 4).write(blocks, codes)


def _read_q4(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits: get_scale_min_k4."""
    a, b, c = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([a & 63, (c & 15) | a >> 6 << 4], 1)
    return scales, np.concatenate([b & 63, c >> 4 | b >> 6 << 4], 1)


def _write_q4(blocks: np.ndarray, scales: np.ndarray, mins: np.ndarray | None) -> None:
    assert mins is not None
    scales, mins = scales.astype(np.uint8), mins.astype(np.uint8)
    blocks[:, 4:8] = scales[:, :4] | scales[:, 4:] >> 4 << 6
    blocks[:, 8:12] = mins[:, :4] | mins[:, 4:] >> 4 << 6
    blocks[:, 12:16] = (scales[:, 4:] & 15) | mins[:, 4:] << 4


def _read_q6(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    return blocks[:, 192:208].view(np.int8), None


def _write_q6(blocks: np.ndarray, scales: np.ndarray, mins: np.ndarray | None) -> None:
    blocks[:, 192:208] = scales.astype(np.int8).view(np.uint8)


def _read_xs(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    """Eight of 6 bits, less 32: the low four in pairs, the high two in pairs of bits of a 16-bit number."""
    low = _Bits(4, 4, 4, 4).read(blocks)
    return (low | _Bits(2, 2, 2, 2, 4).read(blocks)).astype(np.int8) - 32, None


def _write_xs(blocks: np.ndarray, scales: np.ndarray, mins: np.ndarray | None) -> None:
    codes = (scales + 32).astype(np.uint8)
    _Bits(4, 4, 4, 4).write(blocks, codes)
    _Bits(2, 2, 2, 2, 4).write(blocks, codes)


_KVALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml-common.h, kvalues_iq4nl


def _form(
    name: str,
    group: int,
    levels: tuple[int, ...] | range,
    d: int,
    dmin: int | None,
    *bits: _Bits,
    integers: tuple[int, int] = (0, 0),
    read: _Read | None = None,
    write: _Write | None = None,
) -> Form:
    usable = (1 if name == "Q8_0" else 0, len(levels) - 1)
    return Form(TYPE_BY_NAME[name], group, np.array(levels, np.float32), usable, integers, d, dmin, bits, read, write)


_FORMS = {
    form.type.name: form
    for form in (
        _form("Q4_0", 32, range(-8, 8), 0, None, _Bits(2, 16, 1, 4)),
        _form("Q4_1", 32, range(16), 0, 2, _Bits(4, 16, 1, 4)),
        _form("Q5_0", 32, range(-16, 16), 0, None, _Bits(6, 16, 1, 4), _Bits(2, 4, 4, 1, 4)),
        _form("Q5_1", 32, range(32), 0, 2, _Bits(8, 16, 1, 4), _Bits(4, 4, 4, 1, 4)),
        _form("Q8_0", 32, range(-128, 128), 0, None, _Bits(2, 32, 1, 8)),
        _form("Q2_K", 16, range(4), 80, 82, _Bits(16, 64, 2, 2), integers=(0, 15), read=_read_q2, write=_write_q2),
        _form(
            "Q3_K",
            16,
            range(-4, 4),
            108,
            None,
            _Bits(32, 64, 2, 2),
            _Bits(0, 32, 1, 1, 2),
            integers=(-32, 31),
            read=_read_q3,
            write=_write_q3,
        ),
        _form("Q4_K", 32, range(16), 0, 2, _Bits(16, 128, 4, 4), integers=(0, 63), read=_read_q4, write=_write_q4),
        _form(
            "Q5_K",
            32,
            range(32),
            0,
            2,
            _Bits(48, 128, 4, 4),
            _Bits(16, 32, 1, 1, 4),
            integers=(0, 63),
            read=_read_q4,
            write=_write_q4,
        ),
        _form(
            "Q6_K",
            16,
            range(-32, 32),
            208,
            None,
            _Bits(0, 128, 2, 4),
            _Bits(128, 64, 2, 2, 4),
            integers=(-128, 127),
            read=_read_q6,
            write=_write_q6,
        ),
        _form("IQ4_NL", 32, _KVALUES, 0, None, _Bits(2, 16, 1, 4)),
        _form("IQ4_XS", 32, _KVALUES, 0, None, _Bits(8, 128, 8, 4), integers=(-32, 31), read=_read_xs, write=_write_xs),
    )
}


def can_change(type: TensorType) -> bool:
    """Whether single codes of the type can be chosen again. Not in codebooks of whole groups: IQ1, IQ2, IQ3 and their like."""
    return type.name in _FORMS


def form(type: TensorType) -> Form:
    """Raises QuantizeError, by name, for a type whose codes stand for groups of numbers."""
    if not can_change(type):
        raise QuantizeError(
            f"the codes of {type.name} cannot be chosen one by one. Types for compensated rounding: {', '.join(_FORMS)}."
        )
    return _FORMS[type.name]

"""Reading and writing GGUF containers.

The reader is ours because llama.cpp's `gguf` package walks every vocabulary string in Python and trusts the counts in
the file; this one checks each against the file's size. Writing and the float codecs are the `gguf` package's.

Format: https://github.com/ggml-org/ggml/blob/323951f1bdcdfbd5b5ff3a9a7c3770e63b1a560e/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import GgufError

if TYPE_CHECKING:
    import gguf  # at run time inside the functions that need it: a command that only reads starts sooner

MAGIC = b"GGUF"
ALIGNMENT = 32
_SPLIT = ("split.no", "split.count", "split.tensors.count")  # of a file among several; llama-quantize leaves them out, too
CHUNK_ELEMENTS = 1 << 20  # elements converted at once: 4 MB of float32, which stays in the cache


@dataclass(frozen=True)
class TensorType:
    """How ggml stores a tensor's numbers: `block` elements in `size` bytes."""

    id: int
    name: str
    block: int
    size: int

    def row_bytes(self, n: int) -> int:
        return n // self.block * self.size

    @property
    def bits(self) -> float:
        return self.size * 8 / self.block


# ggml/include/ggml.h, enum ggml_type, and the blocks of ggml/src/ggml-common.h: number, name, elements, bytes.
_KNOWN = [
    TensorType(*known)
    for known in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2),
        (26, "I32", 1, 4), (27, "I64", 1, 8), (28, "F64", 1, 8), (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
        (42, "Q2_0", 64, 18),
    )
]  # fmt: skip
TYPES = {t.id: t for t in _KNOWN}
TYPE_BY_NAME = {t.name: t for t in _KNOWN}
F32, F16, BF16, Q8_0 = (TYPE_BY_NAME[n] for n in ("F32", "F16", "BF16", "Q8_0"))


@dataclass(frozen=True)
class Tensor:
    """One tensor as its file stores it.

    shape: rows first, as numpy and PyTorch say it (GGUF lists dimensions in the other order).
    data: memory-mapped; float16/float32 of `shape`, for every other type uint8 of (..., bytes per row).
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: np.ndarray

    def rows(self) -> np.ndarray:
        """The data as a matrix, whatever the number of dimensions."""
        return self.data.reshape(-1, self.data.shape[-1])

    def float32(self) -> np.ndarray:
        """The values, decoded. Raises GgufError for a type that the gguf package cannot decode."""
        return decode(self.data, self.type, self.name)


def decode(data: np.ndarray, type: TensorType, name: str) -> np.ndarray:
    import gguf

    try:
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType(type.id))
    except (NotImplementedError, ValueError):
        raise GgufError(f"{name}: type {type.name} cannot be decoded. Start from the float checkpoint instead.") from None


# The smallest number that `type` rounds to infinity: in Q8_0 by its scale, 1/127 of the largest value, which is a half.
_OVERFLOW = {F16: 65520.0, BF16: float.fromhex("0x1.ffp127"), F32: float("inf"), Q8_0: 127 * 65520.0}


def encoded(tensor: Tensor, type: TensorType, change: Callable[[np.ndarray], np.ndarray] | None = None) -> Iterator[np.ndarray]:
    """The tensor in another float type or Q8_0, a few rows at a time; `change` is done to the rows in float32.

    The same roundings as llama.cpp's converter: through float32, to nearest even.
    Raises GgufError at the first value that is not finite, or overflows `type`.
    """
    import gguf

    rows = tensor.rows()
    step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        if tensor.type == type and not change:
            values = chunk
            finite = _all_finite(chunk, type, tensor.name)
        else:
            floats = decode(chunk, tensor.type, tensor.name)
            with np.errstate(over="ignore", invalid="ignore"):
                floats = change(floats) if change else floats
                values = gguf.quants.quantize(floats, gguf.GGMLQuantizationType(type.id))
            finite = bool(np.abs(floats).max() < _OVERFLOW[type])
        if not finite:
            raise GgufError(_not_finite(tensor, chunk, start, type))
        yield np.ascontiguousarray(values)


_EXPONENTS = {F16: ("<u2", 0x7FFF, 0x7C00), BF16: ("<u2", 0x7FFF, 0x7F80), F32: ("<u4", 0x7FFFFFFF, 0x7F800000)}


def _all_finite(stored: np.ndarray, type: TensorType, name: str) -> bool:
    """By the bits of the exponents, all set in NaN and infinity: many times faster than numpy's isfinite of float16."""
    if type not in _EXPONENTS:
        return bool(np.isfinite(decode(stored, type, name)).all())
    word, without_sign, exponent = _EXPONENTS[type]
    return bool((np.ascontiguousarray(stored).view(word) & without_sign).max() < exponent)


def _not_finite(tensor: Tensor, chunk: np.ndarray, start: int, type: TensorType) -> str:
    floats = decode(chunk, tensor.type, tensor.name)
    bad = ~np.isfinite(floats)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        return (
            f"{tensor.name}: {floats[row, column]} at row {start + row}, column {column}. The checkpoint is damaged, "
            "or its training diverged: download it again, or use an earlier one."
        )
    wider = "f32" if type == BF16 else "bf16"
    return (
        f"{tensor.name}: {np.abs(floats).max():.6g} is too large for {type.name}, which ends at {_OVERFLOW[type]:.6g}. "
        f"Convert with --dtype {wider}."
    )


# Reading

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """shape: rows first. offset: in bytes from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.n_elements // self.type.block * self.type.size


class GgufFile:
    """A GGUF file's metadata, with its tensors memory-mapped.

    fields: key -> bool, int, float, str or list of them.
    kinds: key -> GGUF's number for the value's type. spans: key -> (start, end) of key and value, in bytes of the file.
    tensors: name -> TensorInfo, in file order.
    """

    def __init__(self, path: Path):
        """Raises GgufError: not a GGUF, version other than 2 or 3, cut short, or counts that cannot be true."""
        self.path = path
        self.fields: dict[str, Any] = {}
        self.kinds: dict[str, int] = {}
        self.spans: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with path.open("rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "the file is empty"
            raise GgufError(f"{path} cannot be read as GGUF: {reason}.") from None
        try:
            self._read()
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
            raise GgufError(f"{path} is cut short or damaged ({error}). Download or make it again.") from None

    def _read(self) -> None:
        if self._map[:4] != MAGIC:
            raise GgufError(f"{self.path} is no GGUF file (it starts with {self._map[:4]!r}, expected {MAGIC!r}).")
        version, n_tensors, n_fields = struct.unpack_from("<IQQ", self._map, 4)
        if version not in (2, 3):
            raise GgufError(f"{self.path}: GGUF version {version}, expected 2 or 3. Convert the model again.")
        at = 24
        for _ in range(n_fields):
            start = at
            key, at = self._string(at)
            (kind,) = struct.unpack_from("<I", self._map, at)
            if key in self.fields:
                raise GgufError(f"{self.path}: metadata key {key} appears twice. Make the file again.")
            self.fields[key], at = self._value(kind, at + 4)
            self.kinds[key], self.spans[key] = kind, (start, at)
        if isinstance(parts := self.fields.get("split.count"), int) and parts > 1:
            raise GgufError(
                f"{self.path} is one of {parts} files that make a model. Put them together first: "
                f"llama-gguf-split --merge {self.path} WHOLE.gguf"
            )
        for _ in range(n_tensors):
            at = self._tensor_info(at)
        self.meta_bytes = at
        self.alignment = alignment = self.fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise GgufError(f"{self.path}: general.alignment is {alignment}, expected a power of two.")
        self.data_start = padded(at, alignment)
        end = max((t.offset + t.nbytes for t in self.tensors.values()), default=0)
        if self.data_start + end > len(self._map):
            raise GgufError(
                f"{self.path} is cut short: {len(self._map)} bytes, its tensors need {self.data_start + end}. "
                "Download or make it again."
            )

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._map, at)
        end = at + 8 + length
        if end > len(self._map):
            raise IndexError(f"a string of {length} bytes at byte {at}")
        return self._map[at + 8 : end].decode(), end

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        if kind in _SCALARS:
            (value,) = struct.unpack_from("<" + _SCALARS[kind], self._map, at)
            return value, at + struct.calcsize("<" + _SCALARS[kind])
        if kind == _STRING:
            return self._string(at)
        if kind != _ARRAY:
            raise GgufError(f"{self.path}: metadata of unknown type {kind} at byte {at}. The file is damaged, or newer.")
        item, n = struct.unpack_from("<IQ", self._map, at)
        at += 12
        if item in _SCALARS:
            values = struct.unpack_from(f"<{_checked(n, self._map, at)}{_SCALARS[item]}", self._map, at)
            return list(values), at + struct.calcsize(f"<{n}{_SCALARS[item]}")
        if item != _STRING:
            raise GgufError(f"{self.path}: an array of type {item} at byte {at}, expected numbers or strings.")
        strings, data, length_at = [], self._map, struct.Struct("<Q").unpack_from
        for _ in range(_checked(n, data, at)):  # as _string does it, written out: a vocabulary has 100,000 of them and more
            end = at + 8 + length_at(data, at)[0]
            if end > len(data):
                raise IndexError(f"a string of {end - at - 8} bytes at byte {at}")
            strings.append(data[at + 8 : end].decode())
            at = end
        return strings, at

    def _tensor_info(self, at: int) -> int:
        name, at = self._string(at)
        (n_dims,) = struct.unpack_from("<I", self._map, at)
        if not 1 <= n_dims <= 4:
            raise GgufError(f"{self.path}: {name} has {n_dims} dimensions, expected 1 to 4.")
        dims = struct.unpack_from(f"<{n_dims}Q", self._map, at + 4)
        if not all(dims):
            raise GgufError(f"{self.path}: {name} is {tuple(reversed(dims))}, which holds nothing. Make the file again.")
        type_id, offset = struct.unpack_from("<IQ", self._map, at + 4 + 8 * n_dims)
        if type_id not in TYPES:
            raise GgufError(f"{self.path}: {name} has unknown type {type_id}. The file is damaged, or newer than cnq.")
        info = TensorInfo(name, tuple(reversed(dims)), TYPES[type_id], offset)
        if name in self.tensors:
            raise GgufError(f"{self.path}: tensor {name} appears twice. Make the file again.")
        if dims[0] % info.type.block:
            raise GgufError(f"{self.path}: {name} has rows of {dims[0]}, no multiple of {info.type.name}'s {info.type.block}.")
        self.tensors[name] = info
        return at + 4 + 8 * n_dims + 12

    def tensor(self, name: str) -> Tensor:
        info = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, info.nbytes, self.data_start + info.offset)
        if info.type in (F32, F16):
            data = raw.view(np.float32 if info.type == F32 else np.float16).reshape(info.shape)
        else:
            data = raw.reshape(*info.shape[:-1], info.type.row_bytes(info.shape[-1]))
        return Tensor(name, info.type, info.shape, data)

    def raw(self, key: str) -> bytes:
        """A key and its value as they stand in the file."""
        start, end = self.spans[key]
        return self._map[start:end]

    def field(self, key: str) -> Any:
        """The value of a key that must be there. Raises GgufError."""
        if key not in self.fields:
            raise GgufError(f"{self.path} has no {key}. It is no language model that cnq knows: see cnq inspect {self.path}")
        return self.fields[key]

    @property
    def arch(self) -> str:
        return str(self.field("general.architecture"))

    @cached_property
    def n_params(self) -> int:
        return sum(t.n_elements for t in self.tensors.values())

    @property
    def n_ctx(self) -> int | None:
        """Tokens of context that the model was trained with."""
        return self._count("context_length") or None

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Numbers in a head's key, and in its value; 0 when the file does not say."""
        heads = self._count("attention.head_count")
        size = self._count("embedding_length") // heads if heads else 0
        return self._count("attention.key_length") or size, self._count("attention.value_length") or size

    @property
    def kv_width(self) -> int:
        """Numbers that all layers together keep of a token: its keys and values. 0 when the file does not say."""
        per_layer = self.fields.get(f"{self.arch}.attention.head_count_kv")
        same = self._count("attention.head_count_kv") or self._count("attention.head_count")
        listed = [n for n in per_layer if isinstance(n, int)] if isinstance(per_layer, list) else None
        heads = self._count("block_count") * same if listed is None else sum(listed)
        return heads * sum(self.head_sizes)

    def _count(self, key: str) -> int:
        value = self.fields.get(f"{self.arch}.{key}")
        return value if isinstance(value, int) and value > 0 else 0

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensor data over the parameters, vocabulary included: llama-quantize's BPW."""
        return sum(t.nbytes for t in self.tensors.values()) * 8 / max(1, self.n_params)


def _checked(n: int, data: mmap.mmap, at: int) -> int:
    """An array's length, unless the file could not hold it: every item takes a byte at least."""
    if n > len(data) - at:
        raise IndexError(f"an array of {n} items at byte {at}")
    return n


def padded(n: int, alignment: int = ALIGNMENT) -> int:
    return -(-n // alignment) * alignment


# Writing


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its place in the header, and its bytes in order when their turn comes."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True)
class Layout:
    """A GGUF to be: head: its first bytes, padded. starts: tensor -> where in the file its data begins. nbytes: in all."""

    head: bytes
    starts: dict[str, int]
    nbytes: int


def retyped(file: GgufFile, fields: dict[str, str | int], types: dict[str, TensorType]) -> Layout:
    """The layout of a copy of `file` in which tensors have other types.

    fields: strings and 32-bit numbers that come behind the file's own; those of the same name go. types: of every tensor
    of the file, in the order of the copy. As llama.cpp writes it (ggml/src/gguf.cpp), trailing dimensions of 1 left out.
    """
    kept = [key for key in file.fields if key not in fields and key not in _SPLIT]
    return layout(file, kept, fields, {name: (file.tensors[name].shape, type) for name, type in types.items()})


def layout(
    file: GgufFile, kept: Sequence[str], fields: dict[str, str | int], tensors: dict[str, tuple[tuple[int, ...], TensorType]]
) -> Layout:
    """A file with some of another's metadata, behind it these fields (strings and 32-bit numbers), and these tensors."""
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(kept) + len(fields)), *(file.raw(key) for key in kept)]
    for key, value in fields.items():
        head.append(_packed(key))
        head.append(
            struct.pack("<II", _UINT32, value) if isinstance(value, int) else struct.pack("<I", _STRING) + _packed(value)
        )
    starts, at = {}, 0
    for name, (shape, type) in tensors.items():
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        head.append(_packed(name))
        head.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type.id, at))
        starts[name] = at
        at += padded(prod(shape[:-1]) * type.row_bytes(shape[-1]), file.alignment)
    raw = b"".join(head)
    raw = raw.ljust(padded(len(raw), file.alignment), b"\0")
    return Layout(raw, {name: len(raw) + start for name, start in starts.items()}, len(raw) + at)


def _packed(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def write(path: Path, writer: "gguf.GGUFWriter", tensors: list[Planned], progress: Callable[[int], object]) -> None:
    """Write the writer's metadata and the tensors to `path`; `progress` hears how many bytes were written each time."""
    import gguf

    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=gguf.GGMLQuantizationType(t.type.id))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (out,) = writer.fout
    try:
        writer.write_padding(out, out.tell())
        for t in tensors:
            for chunk in t.chunks():
                out.write(chunk.data)
                progress(chunk.nbytes)
            writer.write_padding(out, t.nbytes)
    finally:
        writer.close()


def rewrite(path: Path, key: str, text: str) -> None:
    """Put another text of the same length in the place of a string among a file's metadata."""
    file, raw = GgufFile(path), text.encode()
    assert len(raw) == len(file.fields[key].encode()), f"{key} has another length"
    with path.open("r+b") as out:
        out.seek(file.spans[key][1] - len(raw))
        out.write(raw)

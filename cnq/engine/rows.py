"""ggml's codecs: rows of a tensor from their stored form to float32, and back with rounding errors weighed.

Each function runs outside of Python's lock, so that threads share the work. Declarations: ggml/include/ggml.h as
llama-cpp-python 0.3.36 ships it.
"""

import ctypes
from functools import cache

import llama_cpp.llama_cpp as lib
import numpy as np

from ..errors import EngineError
from ..gguf_file import F32, TYPE_BY_NAME, TYPES, TensorType


class _Traits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


class _CpuTraits(ctypes.Structure):
    """struct ggml_type_traits_cpu (ggml/include/ggml-cpu.h)."""

    _fields_ = [
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


# Looked up through libllama's handle: see ggml.py.
_cpu_traits = lib._lib.ggml_get_type_traits_cpu
_cpu_traits.restype, _cpu_traits.argtypes = ctypes.POINTER(_CpuTraits), [ctypes.c_int]
_type_traits = lib._lib.ggml_get_type_traits
_type_traits.restype, _type_traits.argtypes = ctypes.POINTER(_Traits), [ctypes.c_int]
_quantize_chunk = lib._lib.ggml_quantize_chunk
_quantize_chunk.restype = ctypes.c_size_t
_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
_validate = lib._lib.ggml_validate_row_data
_validate.restype, _validate.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]


@cache
def _traits(type: TensorType) -> _Traits:
    traits = _type_traits(type.id).contents
    found = (traits.type_name.decode().upper(), traits.blck_size, traits.type_size)
    if found != (type.name.upper(), type.block, type.size):
        raise EngineError(
            f"this llama-cpp-python describes {type.name} as cnq does not know: {found}, expected {(type.block, type.size)}. "
            "Install the tested version: pip install llama-cpp-python==0.3.36"
        )
    return traits


def decode(data: np.ndarray, type: TensorType, out: np.ndarray) -> np.ndarray:
    """Rows in the form of `type` as float32 of the same number of rows, in `out` or where they lie already.

    data: contiguous. out: float32 with room for them. Raises EngineError for a type that cannot be decoded.
    """
    rows = len(data)
    n = data.nbytes // type.size * type.block
    if type == F32:
        return data.view(np.float32).reshape(rows, -1)
    if not (to_float := _traits(type).to_float):
        raise EngineError(f"llama.cpp cannot decode {type.name}. Start from the float file.")
    to_float(data.ctypes.data, out.ctypes.data, n)
    return out[:n].reshape(rows, -1)


def encode(values: np.ndarray, type: TensorType, weights: np.ndarray | None, out: np.ndarray) -> np.ndarray:
    """Float32 rows in the form of `type`: flat bytes, in `out`.

    values: (rows, columns), contiguous. weights: (columns,) float32, how much an error in a column counts; None: alike.
    out: bytes, with room for them. Without weights a type that needs them (IQ1_S, IQ2_XXS, IQ2_XS) aborts the process.
    """
    rows, columns = values.shape
    at = None if weights is None else weights.ctypes.data
    size = _quantize_chunk(type.id, values.ctypes.data, out.ctypes.data, 0, rows, columns, at)
    if size != rows * type.row_bytes(columns):
        raise EngineError(f"llama.cpp wrote {size} bytes for {rows} rows of {columns} in {type.name}. Please report it.")
    return out[:size]


def is_sound(data: np.ndarray, type: TensorType) -> bool:
    """Whether no number in the stored rows is NaN or infinite, as far as llama.cpp looks. data: contiguous."""
    return bool(_validate(type.id, data.ctypes.data, data.nbytes))


# What llama.cpp rounds the other side of a product to (ggml-common.h, block_q8_K).
_Q8_K = np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])


def input_type(type: TensorType) -> TensorType:
    """The form that llama.cpp brings the inputs of a matrix of this type into before it multiplies, on this processor."""
    return TYPES[_cpu_traits(type.id).contents.vec_dot_type]


def rounded_inputs(values: np.ndarray, type: TensorType) -> np.ndarray:
    """Inputs (n, columns) float32 of a matrix of `type` as its product sees them, float32 again.

    With the K and IQ types 256 numbers share a scale, with Q8_0 and the like 32: an outlier among them costs the others
    their digits. Q8_1 rounds as Q8_0 does. For float types the inputs are returned as they are.
    """
    form = input_type(type).name
    if form == "Q8_K":
        blocks = np.empty(values.size // 256, _Q8_K)
        values = np.ascontiguousarray(values, np.float32)
        _cpu_traits(input_type(type).id).contents.from_float(values.ctypes.data, blocks.ctypes.data, values.size)
        return (blocks["qs"] * blocks["d"][:, None]).reshape(values.shape)
    if form in ("Q8_0", "Q8_1"):
        q8_0 = TYPE_BY_NAME["Q8_0"]
        values = np.ascontiguousarray(values, np.float32)
        codes = np.empty(values.size // q8_0.block * q8_0.size, np.uint8)
        encode(values, q8_0, None, codes)
        return decode(codes.reshape(len(values), -1), q8_0, np.empty(values.size, np.float32))
    return values

"""ggml's tensors in memory, as the evaluation callback shows them: the bindings have no struct for them.

Layout: ggml/include/ggml.h, struct ggml_tensor, as llama-cpp-python 0.3.36 ships it (64-bit). `check` compares it with a
loaded model before anything is believed.
"""

import ctypes
from functools import cache

import llama_cpp.llama_cpp as lib
import numpy as np

from ..errors import EngineError
from ..gguf_file import F32, TensorInfo

# Looked up through libllama's handle: the wheel carries several copies of libggml, and a second one must not be loaded.
_op_name = lib._lib.ggml_op_name
_op_name.restype, _op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
_nbytes = lib._lib.ggml_nbytes
_nbytes.restype, _nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
_overhead = lib._lib.ggml_tensor_overhead
_overhead.restype, _overhead.argtypes = ctypes.c_size_t, []
_OBJECT_SIZE = 32  # ggml.c, struct ggml_object
_is_empty = ctypes.cast(lib._lib.ggml_is_empty, ctypes.c_void_p).value


class Tensor(ctypes.Structure):
    """struct ggml_tensor. ne: elements, nb: bytes from one to the next, in each dimension; columns first."""


Tensor._fields_ = [
    ("type", ctypes.c_int32),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int32),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


@cache
def op(name: str) -> int:
    """ggml's number for an operation, e.g. MUL_MAT."""
    return next(n for n in range(256) if _op_name(n) == name.encode())


def array(tensor: Tensor, dtype: type = np.float32) -> np.ndarray:
    """The tensor's numbers where they lie, rows first: (ne3, ne2, ne1, ne0). Valid until the computation goes on."""
    size = int(_nbytes(ctypes.addressof(tensor)))
    memory = (ctypes.c_char * size).from_address(tensor.data)
    return np.ndarray(tuple(reversed(tensor.ne)), dtype, memoryview(memory), strides=tuple(reversed(tensor.nb)))


def check(weight: Tensor, known: TensorInfo) -> None:
    """Compare a weight in memory with what its GGUF says. Raises EngineError when the layout above is not the library's."""
    shape = tuple(reversed(weight.ne))[-len(known.shape) :]
    size = int(_nbytes(ctypes.addressof(weight)))
    found = (_overhead() - _OBJECT_SIZE, weight.name.decode("utf-8", "replace"), shape, weight.type, size)
    expected = (ctypes.sizeof(Tensor), known.name, known.shape, known.type.id, known.nbytes)
    if found != expected:
        raise EngineError(
            f"this llama-cpp-python lays tensors out in memory as cnq does not know: {found}, expected {expected}. "
            "Install the tested version: pip install llama-cpp-python==0.3.36"
        )


def is_float32(tensor: Tensor) -> bool:
    return tensor.type == F32.id


class Flag:
    """A flag that llama.cpp asks after every operation, without entering Python: whether this tensor is empty."""

    def __init__(self) -> None:
        self._tensor = Tensor(ne=(1, 1, 1, 1))

    def set(self, up: bool) -> None:
        self._tensor.ne[0] = 0 if up else 1

    def give_to(self, context: lib.llama_context_params) -> None:
        """Have a context give up its pass, whatever thread it runs in, when the flag is up. The flag must outlive it."""
        context.abort_callback = lib.ggml_abort_callback(_is_empty)
        context.abort_callback_data = ctypes.addressof(self._tensor)

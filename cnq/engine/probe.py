"""A child that tells what the linked llama.cpp was compiled for, and how fast it reads weights of each type.

A process of its own: a llama.cpp compiled for instructions that this processor lacks dies as it is loaded.
"""

import ctypes
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import llama_cpp.llama_cpp as lib

from ..errors import EngineError
from ..gguf_file import F32, TYPE_BY_NAME
from .child import Tell, serve
from .ggml import Tensor

_COLUMNS = 4096  # as in a 7B model
_MANY_ROWS, _TOKENS = 256, 512
_ROUNDS = 7
_ROOM = 16 << 20  # bytes for what ggml needs besides the weights


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _function(name: str, result: object, *arguments: object) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    """One of ggml's, looked up through libllama's handle: see ggml.py. Declarations: ggml.h and ggml-cpu.h."""
    function = getattr(lib._lib, name)
    function.restype, function.argtypes = result, arguments
    return function


_P = ctypes.c_void_p
_init = _function("ggml_init", _P, _InitParams)
_free = _function("ggml_free", None, _P)
_tensor = _function("ggml_new_tensor_2d", _P, _P, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_mul_mat = _function("ggml_mul_mat", _P, _P, _P, _P)
_data = _function("ggml_get_data", _P, _P)
_nbytes = _function("ggml_nbytes", ctypes.c_size_t, _P)
_graph = _function("ggml_new_graph", _P, _P)
_expand = _function("ggml_build_forward_expand", None, _P, _P)
_compute = _function("ggml_graph_compute_with_ctx", ctypes.c_int, _P, _P, ctypes.c_int)
_version = _function("ggml_version", ctypes.c_char_p)
_device = _function("ggml_backend_dev_by_type", _P, ctypes.c_int)
_registry = _function("ggml_backend_dev_backend_reg", _P, _P)
_procedure = _function("ggml_backend_reg_get_proc_address", _P, _P, ctypes.c_char_p)
_place = _function("ggml_backend_buft_alloc_buffer", _P, _P, ctypes.c_size_t)
_place_name = _function("ggml_backend_buft_name", ctypes.c_char_p, _P)
_displace = _function("ggml_backend_buffer_free", None, _P)
_supports = _function("ggml_backend_dev_supports_op", ctypes.c_bool, _P, _P)
_CPU = 0  # ggml-backend.h, GGML_BACKEND_DEVICE_TYPE_CPU


def _build(tell: Tell) -> dict[str, str]:
    """What llama_print_system_info says, by name, and ggml's version."""
    said = lib.llama_print_system_info().decode("utf-8", "replace")
    pairs = (part.split(":")[-1].partition("=") for part in said.split("|") if "=" in part)
    return {"ggml": _version().decode()} | {name.strip(): value.strip() for name, _, value in pairs}


def _read(tell: Tell, types: list[str], nbytes: int, threads: int) -> dict[str, float]:
    """Bytes of weights a second, by type: what a matrix of `nbytes` times a vector takes, once to warm up, then the median.

    The types take turns, so that what else the machine does meets all of them.
    """
    seconds: dict[str, list[float]] = {type: [] for type in types}
    with ExitStack() as stack:
        products = {type: stack.enter_context(_product(type, nbytes)) for type in types}
        for _ in range(1 + _ROUNDS):
            for type, (context, graph, _) in products.items():
                started = time.perf_counter()
                if status := _compute(context, graph, threads):
                    raise EngineError(f"llama.cpp could not multiply a matrix of {type}: status {status}.")
                seconds[type].append(time.perf_counter() - started)
        return {type: size / statistics.median(seconds[type][1:]) for type, (_, _, size) in products.items()}


def _repacked(tell: Tell) -> list[str]:
    """Types of weights that llama.cpp rearranges for this processor when it loads them, which makes their products faster.

    Asked as llama.cpp asks itself (src/llama-model-loader.cpp, weight_buft_supported): which products the device does with
    weights in the buffers that it offers for that.
    """
    device = _device(_CPU)
    address = _procedure(_registry(device), b"ggml_backend_dev_get_extra_bufts")
    offered = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(device) if address else None
    kinds: list[int] = []
    while offered and offered[len(kinds)]:  # ended by a null
        kinds.append(offered[len(kinds)])
    found = []
    for type in TYPE_BY_NAME.values():
        context = _init(_InitParams(_ROOM, None, True))
        weights = _tensor(context, type.id, _COLUMNS, _MANY_ROWS)
        product = _mul_mat(context, weights, _tensor(context, F32.id, _COLUMNS, _TOKENS))
        for kind in kinds:
            if b"REPACK" in _place_name(kind):
                held = Tensor.from_address(weights)
                held.buffer = _place(kind, 0)
                if _supports(device, product):
                    found.append(type.name)
                _displace(held.buffer)
        _free(context)
    return found


@contextmanager
def _product(type: str, nbytes: int) -> Iterator[tuple[int, int, int]]:
    """A matrix of about `nbytes` to be multiplied with a vector: (ggml's context, its graph, the matrix's bytes)."""
    known = TYPE_BY_NAME[type]
    context = _init(_InitParams(nbytes + _ROOM, None, False))  # which aborts when there is not so much memory
    try:
        weights = _tensor(context, known.id, _COLUMNS, nbytes // known.row_bytes(_COLUMNS))
        vector = _tensor(context, F32.id, _COLUMNS, 1)
        for tensor in (weights, vector):
            ctypes.memset(_data(tensor), 0, _nbytes(tensor))  # zeros are numbers in every type, and real pages when written
        graph = _graph(context)
        _expand(graph, _mul_mat(context, weights, vector))
        yield context, graph, int(_nbytes(weights))
    finally:
        _free(context)


if __name__ == "__main__":
    serve({"build": _build, "read": _read, "repacked": _repacked})

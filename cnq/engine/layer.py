"""One layer of a model alone in llama.cpp: hidden states in, the inputs of its matrices and the hidden states behind it out.

It is a GGUF of its own, with the model's metadata, one block, and no vocabulary. llama.cpp takes hidden states in the place of
embeddings (llama_batch.embd), and gives the states behind a layer the name l_out.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import EngineError, listed
from ..gguf_file import GgufFile, TensorType, layout
from ..tuning import PLAIN
from . import ggml
from .model import Model
from .weights import Weights

_VOCABULARY = ("token_embd.weight", "output.weight")
_TOKENS = 32  # of the vocabulary at most: llama.cpp wants some, and computes nothing from them here


class Layer:
    """Use it in a `with`. Names of tensors are the whole model's."""

    def __init__(
        self,
        file: GgufFile,
        number: int,
        types: dict[str, TensorType],
        data: Callable[[str], np.ndarray | None],
        path: Path,
        *,
        n_ctx: int,
        threads: int,
    ):
        """types: of the tensors, as the layer has them here. data: their bytes; None: zeros, to be written later; not asked of
        embedding and output, of which nothing is computed. path: the GGUF that is made, and gone when the layer is in memory.
        n_ctx: rows of hidden states at most.

        Raises EngineError with llama.cpp's words.
        """
        self._own = f"blk.{number}."
        _write(file, number, types, data, path)
        try:
            self._weights = Weights(GgufFile(path))
            tuned = replace(PLAIN, batch=n_ctx)  # a pass in one piece
            self._model = Model(path, n_ctx=n_ctx, n_threads=threads, tuned=tuned, writable=True, watch=self._weights)
        finally:
            path.unlink()

    def __enter__(self) -> "Layer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._model.close()
        del self._model, self._weights  # they keep the disk of the file that is gone

    def locate(self, names: Sequence[str]) -> None:
        """Before `write`: find these weights. Raises EngineError."""
        self._weights.then = None
        self._weights.locate(self._model, [_alone(name, self._own) for name in names])

    def write(self, name: str, data: np.ndarray) -> None:
        """Lay other bytes over a weight."""
        self._weights.write(_alone(name, self._own), data)

    def through(self, states: np.ndarray, weights: Sequence[str], results: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """What is computed when hidden states (n, hidden size) come in: by the names of `weights` what they are multiplied
        with, by llama.cpp's names of `results` these, all (n, columns) float32. The pass ends with the last of them.
        """
        wanted = {_alone(name, self._own).encode(): name for name in weights} | {name.encode(): name for name in results}
        found: dict[str, np.ndarray] = {}
        products = (ggml.op("MUL_MAT"), ggml.op("MUL_MAT_ID"))

        def watch(tensor: ggml.Tensor, ask: bool) -> bool:
            shown = tensor
            name = wanted.get(tensor.name)
            if name is None and tensor.op in products:
                name, shown = wanted.get(tensor.src[0].contents.name), tensor.src[1].contents
            if name is None or ask:
                return (name is not None) == ask
            if not ggml.is_float32(shown):
                raise EngineError(f"{name}: llama.cpp computes it in another type than F32.")
            found[name] = ggml.array(shown).reshape(-1, shown.ne[0]).copy()
            return len(found) < len(wanted)

        self._weights.then = watch
        self._model.feed_states(states)
        if missing := [name for name in wanted.values() if name not in found]:
            raise EngineError(
                f"llama.cpp computes no {listed(missing)} in {self._own[:-1]}: a kind of model that sequential rounding does "
                "not know. Round without: --rounding compensated"
            )
        return found


def _alone(name: str, own: str) -> str:
    return f"blk.0.{name.removeprefix(own)}" if name.startswith(own) else name


def _write(
    file: GgufFile, number: int, types: dict[str, TensorType], data: Callable[[str], np.ndarray | None], path: Path
) -> None:
    own, count = f"blk.{number}.", f"{file.arch}.block_count"
    n_vocab = min(_TOKENS, file.tensors[_VOCABULARY[0]].shape[0])
    fields: dict[str, str | int] = {count: 1, f"{file.arch}.vocab_size": n_vocab, "tokenizer.ggml.model": "none"}
    kept = [key for key in file.fields if key not in fields and not key.startswith(("tokenizer.", "split."))]
    names = {_alone(name, own): name for name in file.tensors if not name.startswith("blk.") or name.startswith(own)}
    shapes = {name: file.tensors[name].shape for name in names.values()}
    shapes |= {name: (n_vocab, *shapes[name][1:]) for name in _VOCABULARY if name in shapes}
    made = layout(file, kept, fields, {alone: (shapes[name], types[name]) for alone, name in names.items()})
    with path.open("wb") as out:
        out.write(made.head)
        for alone, name in names.items():
            if name not in _VOCABULARY and (content := data(name)) is not None:
                out.seek(made.starts[alone])
                out.write(np.ascontiguousarray(content).data)
        out.truncate(made.nbytes)

"""A loaded model's weights where they lie in memory: found as the evaluation callback shows them, overwritten, and restored."""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..errors import EngineError, listed
from ..gguf_file import GgufFile
from . import ggml
from .model import Model

LOOKUP, PRODUCT = "looked up", "multiplied"
Watch = Callable[[ggml.Tensor, bool], bool]


@dataclass(frozen=True)
class _Place:
    """use: what llama.cpp does with the weight there. With tied embeddings the same place may have both uses."""

    use: str
    address: int
    nbytes: int


class Weights:
    """The matrices of a model that was loaded `writable`; it is that model's `watch`, and passes on what it is shown to `then`.

    Its contexts may run at the same time, but not while weights are written.
    """

    def __init__(self, file: GgufFile):
        self._file = file
        self.then: Watch | None = None
        self._places: dict[str, set[_Place]] = {}
        self._uses = {ggml.op("GET_ROWS"): LOOKUP, ggml.op("MUL_MAT"): PRODUCT, ggml.op("MUL_MAT_ID"): PRODUCT}
        self._get_rows = ggml.op("GET_ROWS")
        self._tables: dict[str, np.ndarray] = {}  # what lookups find instead of the weight
        self._searching = True

    def __call__(self, tensor: ggml.Tensor, ask: bool) -> bool:
        if self._searching and ask and (use := self._uses.get(tensor.op)):
            self._find(tensor.src[0].contents, use)
        if self._tables and tensor.op == self._get_rows:
            table = self._tables.get(tensor.src[0].contents.name.decode("utf-8", "replace"))
            if table is not None:
                if not ask:
                    ids = ggml.array(tensor.src[1].contents, np.int32).ravel()
                    ggml.array(tensor)[0, 0] = table[ids]
                return True
        return self.then(tensor, ask) if self.then else not ask

    def _find(self, weight: ggml.Tensor, use: str) -> None:
        name = weight.name.decode("utf-8", "replace")
        if known := self._file.tensors.get(name):
            ggml.check(weight, known)
            self._places.setdefault(name, set()).add(_Place(use, weight.data, known.nbytes))

    def locate(self, model: Model, names: Iterable[str]) -> None:
        """Find the weights with a pass of one token. Raises EngineError when some of `names` are not where the file says."""
        model.feed([model.bos if model.adds_bos else 0])
        self._searching = False
        if missing := [n for n in names if n not in self._places]:
            raise EngineError(f"llama.cpp does not use {listed(missing)} as they are in {self._file.path}.")

    def uses(self, name: str) -> set[str]:
        return {place.use for place in self._places[name]}

    def write(self, name: str, data: np.ndarray) -> None:
        """Lay other bytes, in the file's type, over a weight, whatever it is used for."""
        data = np.ascontiguousarray(data)
        for address, nbytes in {(place.address, place.nbytes) for place in self._places[name]}:
            assert data.nbytes == nbytes
            ctypes.memmove(address, data.ctypes.data, nbytes)

    def look_up(self, name: str, table: np.ndarray) -> None:
        """Until the end of `restored`, have lookups in a weight find the rows of `table` (rows, columns), and not its own."""
        self._tables[name] = table

    @contextmanager
    def restored(self, names: Iterable[str]) -> Iterator[None]:
        """When the block ends, the weights are the file's again."""
        try:
            yield
        finally:
            self._tables.clear()
            for name in names:
                self.write(name, self._file.tensor(name).data)

"""llama-perplexity's file of base log-probabilities: what the float model says, kept for later comparisons.

Format: llama.cpp tools/perplexity/perplexity.cpp. "_logits_", i32 n_ctx, n_vocab, n_chunk, the tokens; then for each scored
token uint16[n_vocab rounded up to even + 4]: float scale, float minimum, codes. log p = scale * code + minimum, cut off at
16 nats below the likeliest token.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from .errors import GgufError

MAGIC = b"_logits_"
_DEPTH = np.float32(16)


def n_scored(n_ctx: int) -> int:
    """Tokens of a chunk that count: its second half, but for the last, which nothing follows."""
    return n_ctx - 1 - n_ctx // 2


def file_bytes(n_chunks: int, n_ctx: int, n_vocab: int) -> int:
    return len(MAGIC) + 12 + 4 * n_chunks * n_ctx + 2 * _width(n_vocab) * n_scored(n_ctx) * n_chunks


def _width(n_vocab: int) -> int:
    return 2 * ((n_vocab + 1) // 2) + 4


class LogitsWriter:
    """Writes the file, in any order; threads may share it."""

    def __init__(self, path: Path, tokens: np.ndarray, n_vocab: int):
        n_chunks, self._n_ctx = tokens.shape
        self._n_vocab = n_vocab
        self._writing = threading.Lock()
        self._out: BinaryIO = path.open("wb")
        self._out.write(MAGIC + np.array([self._n_ctx, n_vocab, n_chunks], np.int32).tobytes())
        self._out.write(np.ascontiguousarray(tokens, np.int32).tobytes())
        self._start = self._out.tell()

    def __enter__(self) -> "LogitsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._out.close()

    def put(self, chunk: int, first: int, logits: np.ndarray) -> None:
        """Logits (n, n_vocab) float32 of the scored tokens of a chunk from its `first` on."""
        top = logits.max(1, keepdims=True)
        low = np.maximum(logits.min(1, keepdims=True), top - _DEPTH)
        log_sum = np.log(np.exp(logits - top).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
        scale = (top - low) / np.float32(65535)
        safe = np.where(scale > 0, scale, np.float32(1))
        rows = np.zeros((len(logits), _width(self._n_vocab)), np.uint16)
        head = np.concatenate([scale, low - top - log_sum], axis=1).astype(np.float32)
        rows[:, :4] = head.view(np.uint16)
        rows[:, 4 : 4 + self._n_vocab] = np.where(logits > low, np.rint((logits - low) / safe), 0)
        with self._writing:
            self._out.seek(self._start + (chunk * n_scored(self._n_ctx) + first) * rows[0].nbytes)
            self._out.write(rows.data)


class LogitsFile:
    """A file of base log-probabilities. tokens: (n_chunks, n_ctx) int32."""

    def __init__(self, path: Path):
        """Raises GgufError: no such file, another kind of file, cut short."""
        try:
            with path.open("rb") as f:
                if f.read(len(MAGIC)) != MAGIC:
                    raise GgufError(f"{path} is no file of base logits: it does not start with {MAGIC.decode()}.")
                head = np.frombuffer(f.read(12), np.int32)
                if len(head) < 3 or (head < 1).any() or n_scored(int(head[0])) < 1:
                    raise GgufError(f"{path} is cut short or damaged. Make it again.")
                self.n_ctx, self.n_vocab, self.n_chunks = (int(n) for n in head)
                if file_bytes(self.n_chunks, self.n_ctx, self.n_vocab) != path.stat().st_size:
                    expected = file_bytes(self.n_chunks, self.n_ctx, self.n_vocab)
                    raise GgufError(f"{path} has {path.stat().st_size} bytes, {expected} expected. Make it again.")
                count = self.n_chunks * self.n_ctx
                self.tokens = np.frombuffer(f.read(4 * count), np.int32).reshape(self.n_chunks, self.n_ctx)
                start = f.tell()
        except OSError as error:
            raise GgufError(f"{path} cannot be read: {error.strerror}.") from None
        self.path = path
        shape = (self.n_chunks, n_scored(self.n_ctx), _width(self.n_vocab))
        self._rows = np.memmap(path, np.uint16, "r", start, shape)

    def log_probs(self, chunk: int, rows: slice) -> np.ndarray:
        """(n, n_vocab) float32 of some of the chunk's scored tokens."""
        found = self._rows[chunk, rows]
        head = np.ascontiguousarray(found[:, :4]).view(np.float32)
        return head[:, :1] * found[:, 4 : 4 + self.n_vocab] + head[:, 1:]

"""The two sums of a merge whose last bits depend on the order in which they are added up.

Where torch is installed it adds, so that a merge gives PEFT's bits. Elsewhere the sums are made in float64 and rounded once:
nearer to the true value, and the same on every machine. The two differ by one unit in the last place in 3 of 100,000 merged
float16 weights at rank 8, in 27 at rank 64 (4096 x 4096, changes of 14 and 40 % of the weights; bfloat16: in 1 and 6).
numpy's own float32 product would be nearer to torch's, but not equal, and OpenBLAS gives another one on every CPU.
"""

import numpy as np

from ..gguf_file import CHUNK_ELEMENTS

_ROWS = 512  # computed at once in float64
_STEP = 128  # rows: a product of fewer may add in another order than that of the whole matrix


def product(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """b @ a of float32 matrices: (rows, rank) x (rank, columns)."""
    try:
        import torch
    except ImportError:
        out = np.empty((b.shape[0], a.shape[1]), np.float32)
        wide = a.astype(np.float64)
        for start in range(0, len(b), _ROWS):
            out[start : start + _ROWS] = b[start : start + _ROWS].astype(np.float64) @ wide
        return out
    return (torch.from_numpy(b) @ torch.from_numpy(a)).numpy()


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Parts of a matrix whose products are, to the bit, those rows of the whole product; about CHUNK_ELEMENTS numbers each."""
    step = max(1, CHUNK_ELEMENTS // columns // _STEP) * _STEP
    starts = range(0, max(step, rows - rows % step), step)
    return [slice(start, rows if start == starts[-1] else start + step) for start in starts]


def lengths(matrix: np.ndarray, axis: int) -> np.ndarray:
    """The Euclidean lengths of a float32 matrix's rows (axis 1) or columns (axis 0)."""
    try:
        import torch
    except ImportError:
        squares = np.zeros(matrix.shape[1 - axis], np.float64)
        for start in range(0, len(matrix), _ROWS):
            part = matrix[start : start + _ROWS].astype(np.float64)
            if axis:
                squares[start : start + _ROWS] = np.einsum("ij,ij->i", part, part)
            else:
                squares += np.einsum("ij,ij->j", part, part)
        return np.sqrt(squares).astype(np.float32)
    return torch.linalg.norm(torch.from_numpy(matrix), dim=axis).numpy()

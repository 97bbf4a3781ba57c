"""Rows to batches: padded, or several examples in one row that do not see each other.

Trainer(..., train_dataset=made.train, data_collator=Padded())
Trainer(..., train_dataset=Packed(made.train, max_length), data_collator=Flattened())
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

UNLEARNED = -100  # the label that torch's cross entropy ignores


@dataclass(frozen=True)
class Padded:
    """Collator: rows on top of each other, filled up on the right with what is neither seen nor learned.

    Rows without labels are learned whole. multiple: of which the length is, which suits tensor cores. The tokenizer's pad
    token is not asked for: none is attended to, and an eos that serves as one stays learned where it is an eos.
    """

    multiple: int = 8

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, torch.Tensor]":
        """input_ids, attention_mask, labels: (rows, tokens) int64."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple

        def filled(columns: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[*column, *[filler] * (width - len(column))] for column in columns])

        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": filled(ids, 0),
            "attention_mask": filled([[1] * len(row) for row in ids], 0),
            "labels": filled([row.get("labels", row["input_ids"]) for row in rows], UNLEARNED),
        }


class Packed:
    """Examples of a dataset, several to a row of at most `max_length` tokens, in place of the dataset.

    Longest first, each to where it leaves the least room (best-fit decreasing). Rows are put together when asked for.
    position_ids begin anew with each example: by them transformers knows what must not see each other. Labels of an example's
    first token are -100, so that none is predicted from the example before it.
    """

    def __init__(self, dataset: "Dataset", max_length: int):
        """Raises ValueError when an example is longer than max_length."""
        self._dataset = dataset
        ids = dataset.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
        lengths = pc.list_value_length(ids).to_pylist() if len(dataset) else []
        self.rows = _best_fit(lengths, max_length)
        self.filled = sum(lengths) / (max_length * len(self.rows)) if self.rows else 0.0  # share of the rows' room

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        parts = [self._dataset[n] for n in self.rows[i]]
        return {
            "input_ids": [id for part in parts for id in part["input_ids"]],
            "labels": [label for part in parts for label in (UNLEARNED, *part["labels"][1:])],
            "position_ids": [n for part in parts for n in range(len(part["input_ids"]))],
        }


def _best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which go together, in order of the first of each."""
    if (longest := max(lengths, default=0)) > size:
        raise ValueError(f"an example of {longest} tokens is longer than the rows of {size}")
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # room -> bins that have it
    rooms: list[int] = []  # the keys, sorted
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        at = bisect_left(rooms, lengths[n])
        if at < len(rooms):
            room = rooms[at]
            bin = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        else:
            room, bin = size, len(bins)
            bins.append([])
        bins[bin].append(n)
        if left := room - lengths[n]:
            if left not in open_bins:
                insort(rooms, left)
            open_bins.setdefault(left, []).append(bin)
    return sorted(sorted(bin) for bin in bins)


@dataclass(frozen=True)
class Flattened:
    """Collator for rows of Packed: one behind the other in a single row, whatever the batch size.

    So every attention of transformers keeps the examples apart. Flash attention looks at position_ids only in batches of one,
    SDPA and eager only without an attention_mask and without a cache, which models fill unless told otherwise.
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, torch.Tensor | bool]":
        """input_ids, labels, position_ids: (1, tokens) int64. use_cache: False."""
        import torch

        names = ("input_ids", "labels", "position_ids")
        return {
            **{name: torch.tensor([[value for row in rows for value in row[name]]]) for name in names},
            "use_cache": False,
        }

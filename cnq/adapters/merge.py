"""Base + adapters → a checkpoint whose tensors are merged as they are read: nothing is held but one tensor and its changes."""

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, catalog
from ..checkpoint import Checkpoint
from ..checkpoint.checkpoint import Entry, Origin, typed
from ..checkpoint.digest import overall, tensor_digest
from ..checkpoint.hf import copy_tokenizer
from ..errors import CheckpointError, GgufError, listed
from ..files import sha256
from ..gguf_file import F32, Tensor, TensorType, encoded
from . import low_rank
from .adapter import Adapter, LowRank, Rows, floats
from .arithmetic import row_blocks
from .low_rank import adding, adds_by_rows
from .plan import Plan, Shift, Step, Whole, memory, plan

_UNKNOWN = "0" * 64  # stands for a digest until it is known


@dataclass(frozen=True)
class Effect:
    """What an adapter did. modules: changed by low rank. whole: tensors replaced, altogether or some rows of them.

    ranks, scales: those that occur. largest: the largest ‖change‖ / ‖matrix‖ among the modules, and in which it was.
    """

    adapter: str
    modules: int
    whole: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    largest: float
    largest_in: str


@dataclass(frozen=True)
class Merge:
    """A merge under way: `checkpoint` gives the merged tensors. memory: bytes it takes at its largest tensor."""

    checkpoint: Checkpoint
    memory: int
    _reader: "_Reader"

    def effects(self) -> tuple[Effect, ...]:
        """What each adapter did to the tensors that have been read."""
        return tuple(self._reader.effect(number) for number in range(len(self._reader.adapters)))

    def notes(self) -> tuple[str, ...]:
        """What came to light while the tensors were read."""
        steps = self._reader.plan.steps
        lost = [n for n in sorted(self._reader.unchanged) if not all(isinstance(step.what, Whole) for step in steps[n])]
        return (f"the merge changes {len(lost)} tensors by less than their type can hold: {listed(lost)}",) if lost else ()


def merge(base: Checkpoint, adapters: Sequence[Adapter], dtype: TensorType | None = None) -> Merge:
    """Plan the merge of adapters, in this order, into a base.

    The result equals PEFT's: each adapter loaded onto the model before it in float32 and merged, and in the end, once,
    rounded: matrices to `dtype`; vectors, and without it all, to their type in the base. The tokenizer is that of the last
    adapter that brings one.
    Raises CheckpointError and VocabMismatch: adapters that do not fit the base, or one another in this order.
    """
    adapters = list(adapters)
    planned = plan(base, adapters, dtype)
    reader = _Reader(base, adapters, planned, _record(base, adapters))
    brought = next((a.tokenizer for a in reversed(adapters) if a.tokenizer), None)

    def tokenizer(scratch: Path) -> Path:
        if brought is None:
            return base.tokenizer(scratch)
        copy_tokenizer(brought, scratch)
        (scratch / "config.json").write_text(json.dumps(planned.config), encoding="utf-8")  # it may name bos and eos
        return scratch

    checkpoint = replace(
        base,
        config=planned.config,
        entries=planned.entries,
        read=reader.read,
        tokenizer=tokenizer,
        notes=(*base.notes, *planned.notes),
        origin=Origin(reader.record, reader.seal),
    )
    return Merge(checkpoint, memory(planned), reader)


@dataclass
class _Reader:
    """Reads merged tensors, and takes note of what is to be known of them in the end.

    digests: of the base's tensors, as they pass. unchanged: tensors that came out as they went in.
    moved: (adapter, module) -> ‖change‖ / ‖matrix‖.
    """

    base: Checkpoint
    adapters: list[Adapter]
    plan: Plan
    record: dict[str, Any]
    digests: dict[str, tuple[str, str]] = field(default_factory=dict)
    unchanged: set[str] = field(default_factory=set)
    moved: dict[tuple[int, str], float] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """The merged tensor. Raises GgufError when it holds a number that is not finite, or too large for its type."""
        steps = self.plan.steps.get(name)
        old = self._from_base(name)
        if not steps:
            return _rounded(replace(old, name=name), self.plan.entries[name])
        new = self._merged(name, steps, old)
        if _same(old, new):
            self.unchanged.add(name)
        return new

    def _from_base(self, name: str) -> Tensor:
        name = self.plan.sources.get(name, name)
        tensor = self.base.read(name)
        if name not in self.digests:
            self.digests[name] = tensor_digest(tensor)
        return tensor

    def _merged(self, name: str, steps: list[Step], tensor: Tensor) -> Tensor:
        entry = self.plan.entries[name]
        left: list[Step] = []  # to be done after the last replacement, which makes undone what came before it
        for step in steps:
            if isinstance(step.what, Whole):
                tensor, left = step.what.weight[1](), []
            else:
                left.append(step)
        if not left:
            return _rounded(replace(tensor, name=name), entry)
        plain = [step.what for step in left if isinstance(step.what, LowRank) and adds_by_rows(step.what, step.transposed)]
        if len(plain) == len(left):
            with suppress(GgufError):  # which is met again below, and then tells the place in the whole matrix
                out, squares = _added(tensor, plain, entry)
                for step, found in zip(left, squares, strict=True):
                    self._note(step, name, *found)
                return replace(out, name=name)
        values = floats(tensor)
        for step in left:
            what = step.what
            if isinstance(what, LowRank):
                self._note(step, name, *low_rank.add(values, what, step.transposed))
            elif isinstance(what, Rows):
                values[list(what.at)] = what.values[1]().float32()
            elif isinstance(what, Shift):
                values += what.values[1]().float32() * np.float32(what.scale)
        return _rounded(Tensor(name, F32, entry.shape, values), entry)

    def _note(self, step: Step, name: str, change: float, before: float) -> None:
        self.moved[step.adapter, name.removesuffix(".weight")] = sqrt(change / max(before, float(np.finfo(np.float32).tiny)))

    def effect(self, number: int) -> Effect:
        adapter = self.adapters[number]
        moved = {module: ratio for (n, module), ratio in self.moved.items() if n == number}
        largest_in = max(moved, key=lambda module: moved[module], default="")
        return Effect(
            adapter=adapter.name,
            modules=len(adapter.low_rank),
            whole=len(adapter.whole) + len(adapter.rows),
            ranks=tuple(sorted({change.rank for change in adapter.low_rank.values()})),
            scales=tuple(sorted({change.scale for change in adapter.low_rank.values()})),
            largest=moved.get(largest_in, 0.0),
            largest_in=largest_in,
        )

    def seal(self) -> dict[str, Any]:
        """The record with the base's digest, when every merged tensor has been read."""
        if self.unchanged == self.plan.steps.keys():
            raise CheckpointError(
                f"the merge changes nothing: after {listed(a.name for a in self.adapters)} all {len(self.unchanged)} tensors "
                f"that they change are as in {self.base.path}. They are merged already, or hardly trained: check both."
            )
        for name in self.base.entries:
            if name not in self.digests:  # replaced, and not asked for
                self._from_base(name)
        digest = overall(self.digests)
        expected = self.adapters[0].settings.base_digest
        if expected not in (None, digest):
            raise CheckpointError(
                f"{self.adapters[0].path} was trained on a base of content digest {expected}, {self.base.path} has {digest}: "
                "another base, though of the same shapes. Give the one it was trained on."
            )
        return self.record | {"base": self.record["base"] | {"content_sha256": digest}}


def _record(base: Checkpoint, adapters: list[Adapter]) -> dict[str, Any]:
    """The content of cnq_merge.json, but for the base's digest (cnq.checkpoint.digest). adapters: in the order of merging."""
    found = {"name": catalog.hub_id(base.path) or base.path.resolve().name, "content_sha256": _UNKNOWN}
    return {
        "cnq": __version__,
        "base": found | ({"merge": base.origin.planned} if base.origin else {}),
        "adapters": [
            {"name": a.name, "sha256": sha256(a.file), "rank": a.settings.rank, "alpha": a.settings.alpha} for a in adapters
        ],
    }


def _added(tensor: Tensor, changes: list[LowRank], entry: Entry) -> tuple[Tensor, list[tuple[float, float]]]:
    """A matrix with changes added and rounded once, by all cores, each with a few rows that stay in its cache.

    Returns it, and for each change (‖change‖², ‖what it was added to‖²).
    """
    rows, adds, out = tensor.rows(), [adding(change) for change in changes], _room(entry)
    columns = tensor.shape[-1]

    def work(part: slice) -> list[tuple[float, float]]:
        values = floats(Tensor(tensor.name, tensor.type, (part.stop - part.start, columns), rows[part]))
        squares = [add(values, part) for add in adds]
        _store(encoded(Tensor(tensor.name, F32, values.shape, values), entry.type), out[part])
        return squares

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(work, row_blocks(len(rows), columns)))
    total = np.sum(found, axis=0)  # (changes, 2)
    return _typed(tensor.name, out, entry), [(float(change), float(before)) for change, before in total]


def _room(entry: Entry) -> np.ndarray:
    """(rows, bytes of a row) for a tensor's stored form."""
    width = entry.type.row_bytes(entry.shape[-1])
    return np.empty((entry.nbytes // width, width), np.uint8)


def _typed(name: str, raw: np.ndarray, entry: Entry) -> Tensor:
    return Tensor(name, entry.type, entry.shape, typed(raw.reshape(-1), entry.type, entry.shape))


def _rounded(tensor: Tensor, entry: Entry) -> Tensor:
    """The tensor in another type: rounded to nearest even, and refused where that would overflow."""
    if tensor.type == entry.type:
        return tensor
    out = _room(entry)
    _store(encoded(tensor, entry.type), out)
    return _typed(tensor.name, out, entry)


def _store(chunks: Iterable[np.ndarray], out: np.ndarray) -> None:
    start = 0
    for chunk in chunks:
        out[start : start + len(chunk)] = chunk.view(np.uint8)
        start += len(chunk)


def _same(old: Tensor, new: Tensor) -> bool:
    """Whether nothing changed: what is left of `old` in the other's type is the same."""
    if old.shape != new.shape:
        return False
    rows, start = new.rows(), 0
    for chunk in encoded(old, new.type):
        if not np.array_equal(chunk.view(np.uint8), rows[start : start + len(chunk)].view(np.uint8)):
            return False
        start += len(chunk)
    return True

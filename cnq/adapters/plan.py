"""What happens to each tensor of a base when adapters are merged into it, checked before anything is read."""

from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from .. import vocab
from ..archs.arch import Config
from ..checkpoint import Checkpoint
from ..checkpoint.checkpoint import Entry, Weight
from ..errors import CheckpointError, VocabMismatch, listed
from ..gguf_file import BF16, F16, F32, TensorType
from .adapter import Adapter, LowRank, Rows


@dataclass(frozen=True)
class Whole:
    """The tensor is replaced."""

    weight: Weight


@dataclass(frozen=True)
class Shift:
    """scale · values is added to a bias: the bias of lora_B."""

    scale: float
    values: Weight


@dataclass(frozen=True)
class Step:
    """What adapter number `adapter` does to a tensor. transposed: a matrix that is stored as (columns, rows)."""

    adapter: int
    what: Whole | Rows | LowRank | Shift
    transposed: bool = False


@dataclass
class Plan:
    """config, entries: of the merged model. steps: tensor -> what happens to it, in order. notes: for the user.

    sources: tensors that the base has under another name: an output head that shared the embedding's rows and does no more.
    """

    config: Config
    entries: dict[str, Entry]
    steps: dict[str, list[Step]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan(base: Checkpoint, adapters: list[Adapter], dtype: TensorType | None) -> Plan:
    """Check that the adapters fit the base, and one another in this order.

    dtype: of the matrices; None = as in the base. Raises CheckpointError, VocabMismatch.
    """
    if not adapters:
        raise CheckpointError("no adapter to merge. Name one at least.")
    quantized = [name for name, entry in base.entries.items() if entry.type not in (F32, F16, BF16)]
    if quantized:
        raise CheckpointError(
            f"{base.path} is quantized ({base.entries[quantized[0]].type.name}): an adapter is merged into the numbers it was "
            "trained on, not into what their quantization left. Give the float model as base."
        )
    planner = _Planner(base, adapters, dtype)
    for number in range(len(adapters)):
        planner.add(number)
    return planner.plan


class _Planner:
    def __init__(self, base: Checkpoint, adapters: list[Adapter], dtype: TensorType | None):
        self.base, self.adapters = base, adapters
        entries = {name: replace(e, type=dtype) if dtype and len(e.shape) > 1 else e for name, e in base.entries.items()}
        self.plan = Plan(dict(base.config), entries)
        self.embedding, self.head = base.arch.hf_name("token_embd.weight"), base.arch.hf_name("output.weight")
        self.grown_by: Adapter | None = None  # the last adapter that brought an embedding

    def add(self, number: int) -> None:
        adapter = self.adapters[number]
        skipped = self._part_head(adapter)
        self._resize(adapter)
        self._require_complete(adapter)
        for name, weight in adapter.whole.items():
            if name not in skipped:
                self._step(Step(number, Whole(weight)), name, weight[0].shape)
        for name, rows in adapter.rows.items():
            if name not in skipped:
                self._rows(number, name, rows)
        for module, change in adapter.low_rank.items():
            if f"{module}.weight" not in skipped:
                self._low_rank(number, module, change)

    def _low_rank(self, number: int, module: str, change: LowRank) -> None:
        adapter, name = self.adapters[number], f"{module}.weight"
        entry = self.plan.entries.get(name)
        # As in PEFT, linear layers are (rows, columns) whatever the settings say; others show by their shape that they are not.
        transposed = bool(adapter.settings.fan_in_fan_out and entry and entry.shape == change.shape[::-1] != change.shape)
        self._step(Step(number, change, transposed), name, change.shape[::-1] if transposed else change.shape)
        if change.bias:
            if f"{module}.bias" not in self.plan.entries:
                raise CheckpointError(
                    f"{adapter.file}: {module}.lora_B has a bias (lora_bias), the base has none there to add it to. "
                    "Train without lora_bias."
                )
            self._step(Step(number, Shift(change.scale, change.bias)), f"{module}.bias", change.bias[0].shape)

    def _rows(self, number: int, name: str, rows: Rows) -> None:
        entry = self.plan.entries.get(name)
        n = entry.shape[0] if entry else 0
        if entry and max(rows.at) >= n:
            raise CheckpointError(
                f"{self.adapters[number].file}: token {max(rows.at)} was trained, but {name} has {n} rows. "
                f"{self._other_base(number)}"
            )
        self._step(Step(number, rows), name, (n, rows.values[0].shape[1]))

    def _step(self, step: Step, name: str, shape: tuple[int, ...]) -> None:
        file, entries = self.adapters[step.adapter].file, self.plan.entries
        if name not in entries:
            raise CheckpointError(f"{file} changes {name}, which the base does not have. {self._other_base(step.adapter)}")
        if entries[name].shape != shape:
            raise CheckpointError(
                f"{file} changes {name} as {shape}, in the base it is {entries[name].shape}. {self._other_base(step.adapter)}"
            )
        self.plan.steps.setdefault(name, []).append(step)

    def _other_base(self, number: int) -> str:
        adapter = self.adapters[number]
        trained_on = f" ({adapter.settings.base})" if adapter.settings.base else ""
        before = f" with {listed(a.name for a in self.adapters[:number])} merged in" if number else ""
        return (
            f"The adapter is of another base{trained_on} than {self.base.path}{before}. Give the one it was trained on, and "
            "adapters in the order they were trained in."
        )

    def _require_complete(self, adapter: Adapter) -> None:
        """Every module that the adapter's settings name is there: a part of them is what is saved when saving went wrong."""
        settings, vocabulary = adapter.settings, (self.embedding, self.head)
        missing = []
        for name, entry in self.plan.entries.items():
            module, _, kind = name.rpartition(".")
            if kind != "weight":
                continue
            if settings.saves(module) and name not in adapter.whole:
                missing.append(module)
            matrix = len(entry.shape) == 2
            if matrix and settings.targeted(module, name in vocabulary) and module not in adapter.low_rank:
                missing.append(module)
        if missing:
            raise CheckpointError(
                f"{adapter.file} ({adapter.file.stat().st_size} bytes) lacks {len(missing)} modules that were trained by its "
                f"adapter_config.json: {listed(missing)}. It was not saved whole: save it again with save_pretrained."
            )

    def _resize(self, adapter: Adapter) -> None:
        """Follow the vocabulary: it grows from adapter to adapter, or stays; an adapter's tokenizer is of its size."""
        rows = int(self.plan.config["vocab_size"])
        vocabulary = [name for name in (self.embedding, self.head) if name in self.plan.entries]
        shapes = {name: adapter.whole[name][0].shape for name in vocabulary if name in adapter.whole}
        brought = {name: shape[0] for name, shape in shapes.items() if len(shape) == 2}
        if brought:
            found = max(brought.values())
            if min(brought.values()) < rows:
                raise CheckpointError(self._shrunk(adapter, min(brought.values()), rows))
            if found > rows and [brought.get(name) for name in vocabulary] != [found] * len(vocabulary):
                raise CheckpointError(
                    f"{adapter.file} brings {listed(f'{name} with {n} rows' for name, n in brought.items())}, the base has "
                    f"{rows}: where a vocabulary grows, {listed(vocabulary)} have to be in the adapter. Save it again with "
                    "save_embedding_layers=True."
                )
            for name in brought:
                self.plan.entries[name] = replace(self.plan.entries[name], shape=(found, *self.plan.entries[name].shape[1:]))
            self.plan.config["vocab_size"] = rows = found
            self.grown_by = adapter
        if adapter.tokenizer:
            try:
                vocab.load(adapter.tokenizer, rows)
            except VocabMismatch as error:
                where = "its embedding" if brought else "the embedding it is merged into"
                raise VocabMismatch(
                    f"{adapter.path}: the adapter's tokenizer and {where}, {rows} rows, do not belong together: {error}"
                ) from None

    def _shrunk(self, adapter: Adapter, found: int, rows: int) -> str:
        if self.grown_by:
            return (
                f"{adapter.name} has an embedding of {found} rows, {self.grown_by.name}, given before it, one of {rows}: the "
                f"order is wrong, for a vocabulary only grows. Give {adapter.name} before {self.grown_by.name}."
            )
        return (
            f"{adapter.name} has an embedding of {found} rows, the base {self.base.path} one of {rows}: the adapter is of "
            "another base, or is merged already. Give the base that it was trained on."
        )

    # An output head that shares the embedding's rows

    def _part_head(self, adapter: Adapter) -> set[str]:
        """Give a tied output head rows of its own when training changed only one of the two, or both in different ways.

        (PEFT says that such a merge is not possible, and suggests to do this first: a merge into the shared rows would give
        each of the two the other's change.) Returns the tensors of the adapter that are the embedding's by another name.
        """
        if self.head in self.plan.entries or not self.plan.config.get("tie_word_embeddings"):
            return set()
        embedding, head = self.embedding, self.head
        touched = {*adapter.whole, *adapter.rows, *(f"{module}.weight" for module in adapter.low_rank)}
        if adapter.settings.tied or self._saved_twice(adapter):
            return {head} & touched
        low_rank = embedding.removesuffix(".weight") in adapter.low_rank
        if head not in touched and embedding not in adapter.apart and not low_rank:
            return set()
        self.plan.config["tie_word_embeddings"] = False
        self.plan.entries[head] = self.plan.entries[embedding]
        self.plan.steps[head] = list(self.plan.steps.get(embedding, []))
        self.plan.sources[head] = embedding
        self.plan.notes.append(
            f"{adapter.name} changes {embedding} and {head} in different ways: they no longer share their rows "
            "(tie_word_embeddings false)"
        )
        return set()

    def _saved_twice(self, adapter: Adapter) -> bool:
        """Whether the embedding was saved under both names, as PEFT does after the vocabulary has grown."""
        pair = [adapter.whole.get(name) for name in (self.embedding, self.head)]
        one, two = (weight[1]().data if weight else None for weight in pair)
        if one is None or two is None or len(adapter.apart & {self.embedding, self.head}) == 2:
            return False
        changed = {*adapter.rows, *(f"{module}.weight" for module in adapter.low_rank)} & {self.embedding, self.head}
        return not changed and one.dtype == two.dtype and np.array_equal(one, two)


def memory(plan: Plan) -> int:
    """Bytes that merging takes at its largest tensor: it and its change in float32; or, replaced, in its own type."""

    def need(name: str) -> int:
        entry = plan.entries[name]
        n, parts = prod(entry.shape), 0
        for step in plan.steps[name]:
            if isinstance(step.what, Whole):
                parts = 0
                continue
            if isinstance(step.what, LowRank):
                parts = max(parts, 4 * n + 4 * step.what.rank * sum(step.what.shape))
            parts = max(parts, entry.nbytes)
        return 4 * n + parts if parts else entry.nbytes

    return max(map(need, plan.steps), default=0)

"""An adapter on disk: PEFT's directory, or a trainer's checkpoint that holds an adapter's weights."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import catalog
from ..archs.arch import DROPPED
from ..checkpoint.checkpoint import Weight, Weights
from ..checkpoint.hf import read_weights
from ..errors import CheckpointError, listed
from ..gguf_file import Tensor
from .settings import CONFIG, NO_TARGETS, Settings, read_settings

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINER_FILES = ("pytorch_model.bin", "model.safetensors")  # a trainer's names; their tensors decide
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")


@dataclass(frozen=True)
class LowRank:
    """A change of one matrix by scale · b @ a.

    a: (rank, columns). b: (rows, rank). Of an embedding, whose rows are looked up, the product is the transpose of the
    change: a is (rank, rows), b (columns, rank).
    magnitude: DoRA's length of each row, of an embedding of each column. bias: (rows,), what b adds to its product.
    """

    rank: int
    scale: float
    embedding: bool
    a: Weight
    b: Weight
    magnitude: Weight | None = None
    bias: Weight | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that is changed."""
        rows, columns = self.b[0].shape[0], self.a[0].shape[1]
        return (columns, rows) if self.embedding else (rows, columns)


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that were trained: (number of rows, columns) instead of those at `at`."""

    at: tuple[int, ...]
    values: Weight


@dataclass(frozen=True)
class Adapter:
    """What was trained, by Hugging Face's names.

    path: its directory. name: the hub id it was fetched as, or the directory's name. file: its weights.
    low_rank: module -> change. whole: tensor -> what takes its place. rows: tensor -> what takes the place of some rows.
    apart: tensors of `whole` that training kept apart from others that share their numbers (modules_to_save).
    tokenizer: its directory, if it brings a tokenizer.
    """

    path: Path
    name: str
    file: Path
    settings: Settings
    low_rank: dict[str, LowRank]
    whole: dict[str, Weight]
    rows: dict[str, Rows]
    apart: frozenset[str]
    tokenizer: Path | None


def read_adapter(path: Path, *, alpha: float | None = None, rank: int | None = None) -> Adapter:
    """Open an adapter and check its low-rank matrices, which are read for it.

    alpha, rank: of an adapter without adapter_config.json, as a trainer's checkpoint is; elsewhere they are not looked at.
    Raises CheckpointError: no adapter, an empty one (443 bytes), one whose matrices do not go together, are not finite or
    change nothing, and kinds of adapters that cnq does not merge.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory. Give the directory of an adapter (adapter_config.json and weights).")
    file = _weights_file(path)
    settings = read_settings(path) if (path / CONFIG).is_file() else None
    weights = read_weights(file)
    if not weights:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) holds no tensors: training saved an empty adapter, as scripts that replace "
            "model.state_dict do with a newer PEFT. Save it again with save_pretrained, or take an earlier checkpoint."
        )
    parts = _parts(file, weights)
    if not parts.low_rank and not (settings and settings.targets == NO_TARGETS and all(map(settings.saves, parts.modules()))):
        raise CheckpointError(
            f"{file} holds {len(weights)} tensors ({listed(weights, 2)}) but no lora_A and lora_B: it is a model without its "
            "adapter, or an adapter that was not saved whole. Give the directory that save_pretrained wrote."
        )
    settings = settings or _given(path, file, alpha, rank)
    low_rank = {module: _low_rank(file, module, found, settings) for module, found in parts.low_rank.items()}
    for module, change in low_rank.items():
        _require_effect(file, module, change)
    return Adapter(
        path=path,
        name=catalog.hub_id(path) or path.resolve().name,
        file=file,
        settings=settings,
        low_rank=low_rank,
        whole=parts.whole,
        rows={f"{module}.weight": _rows(file, module, values, settings) for module, values in parts.rows.items()},
        apart=frozenset(parts.apart.keys() | {name for name in parts.whole if settings.saves(name.rpartition(".")[0])}),
        tokenizer=path if any((path / name).is_file() for name in _TOKENIZERS) else None,
    )


def _weights_file(path: Path) -> Path:
    for name in (*_FILES, *_TRAINER_FILES):
        if (path / name).is_file():
            return path / name
    inside = sorted(found.parent for found in path.glob(f"*/{CONFIG}"))
    if inside:
        raise CheckpointError(f"{path} is a trainer's checkpoint; the adapter lies inside it: give {inside[-1]}")
    holds = listed(sorted(p.name for p in path.iterdir())) or "nothing"
    raise CheckpointError(
        f"{path} has no adapter's weights: neither {' nor '.join(_FILES)} (it holds {holds}). Give the directory that "
        "save_pretrained wrote."
    )


def _given(path: Path, file: Path, alpha: float | None, rank: int | None) -> Settings:
    """The settings of an adapter without adapter_config.json."""
    if alpha is None or rank is None:
        inside = "".join(f" The adapter may be in {found.parent}." for found in sorted(path.glob(f"*/{CONFIG}")))
        raise CheckpointError(
            f"{path} has {file.name} but no {CONFIG}, as a trainer's checkpoint. Say what it was trained with: "
            f"python -m training.merge_lora … --lora-alpha A --lora-rank R; or copy {CONFIG} beside it.{inside}"
        )
    return Settings(rank=rank, alpha=alpha)


# Names in the file. What stands behind the module: PEFT leaves the adapter's own name ("default") out when it saves, a
# trainer does not; base_layer, original_module and token_adapter are wrappers that PEFT puts around a module.
_NAME = r"(?P<name>(?!weight$)[^.]+)"
_PLACES = [
    (kind, re.compile(rf"(?:base_model\.model\.)?(?P<module>.+?)\.{pattern}"))
    for kind, pattern in (
        ("a", rf"lora_A(?:\.{_NAME})?\.weight"),
        ("b", rf"lora_B(?:\.{_NAME})?\.weight"),
        ("bias", rf"lora_B(?:\.{_NAME})?\.bias"),
        ("embedding_a", rf"lora_embedding_A(?:\.{_NAME})?"),
        ("embedding_b", rf"lora_embedding_B(?:\.{_NAME})?"),
        ("magnitude", rf"lora_magnitude_vector(?:\.{_NAME})?(?:\.weight)?"),
        ("apart", rf"modules_to_save(?:\.{_NAME})?\.(?P<of>weight|bias)"),
        ("rows", rf"token_adapter\.trainable_tokens_delta(?:\.{_NAME})?"),
        ("copy", rf"(?:original_module\.(?:weight|bias)|token_adapter\.trainable_tokens_original(?:\.{_NAME})?)"),
        ("whole", r"(?:token_adapter\.)?(?:base_layer\.)?(?P<of>weight|bias)"),
    )
]


@dataclass(frozen=True)
class _Parts:
    low_rank: dict[str, dict[str, Weight]]
    whole: dict[str, Weight]
    rows: dict[str, Weight]
    apart: dict[str, Weight]

    def modules(self) -> list[str]:
        """What was trained whole."""
        return [name.rpartition(".")[0] for name in self.whole]


def _parts(file: Path, weights: Weights) -> _Parts:
    """The file's tensors by what they are."""
    places = {name: _place(name) for name in weights if not name.endswith(DROPPED)}
    if unknown := [name for name, (kind, _) in places.items() if not kind]:
        raise CheckpointError(f"{file}: tensors that cnq does not know: {listed(unknown)}. Merge it with PEFT.")
    if len(adapters := {found["name"] for _, found in places.values() if found.get("name")}) > 1:
        raise CheckpointError(
            f"{file} holds several adapters ({listed(sorted(adapters))}). Save the one that is meant by itself."
        )
    parts = _Parts({}, {}, {}, {})
    for name, (kind, found) in places.items():
        module, tensor = found["module"], f"{found['module']}.{found.get('of')}"
        match kind:
            case "copy":
                continue
            case "rows":
                group, key = parts.rows, module
            case "apart":
                group, key = parts.apart, tensor
            case "whole":
                group, key = parts.whole, tensor
            case _:
                group, key = parts.low_rank.setdefault(module, {}), kind
        if key in group:
            raise CheckpointError(f"{file}: {name} says a second time what becomes of {module}. Save the adapter again.")
        group[key] = weights[name]
    # With a resized embedding PEFT saves a module twice, and loads what has no modules_to_save in its name.
    parts.whole.update({name: weight for name, weight in parts.apart.items() if name not in parts.whole})
    return parts


def _place(name: str) -> tuple[str, dict[str, str]]:
    """(kind, named parts) of a tensor's name; ("", {}) of one that is not known."""
    return next(((kind, m.groupdict()) for kind, pattern in _PLACES if (m := pattern.fullmatch(name))), ("", {}))


def _low_rank(file: Path, module: str, found: dict[str, Weight], settings: Settings) -> LowRank:
    embedding = any(kind.startswith("embedding") for kind in found)
    a, b = (found.get(f"embedding_{side}" if embedding else side) for side in "ab")
    if embedding and found.keys() & {"a", "b", "bias"}:
        raise CheckpointError(f"{file}: {module} is changed as an embedding and as a linear layer. Save the adapter again.")
    if a is None or b is None:
        has, lacks = ("lora_A", "lora_B") if a else ("lora_B", "lora_A")
        raise CheckpointError(f"{file}: {module} has {has} but no {lacks}. The adapter was not saved whole: save it again.")
    rank = settings.rank_of(module)
    shapes = a[0].shape, b[0].shape
    if any(len(shape) != 2 or not all(shape) for shape in shapes) or (shapes[0][0], shapes[1][1]) != (rank, rank):
        raise CheckpointError(
            f"{file}: {module} has lora_A {shapes[0]} and lora_B {shapes[1]}, by its rank expected ({rank}, columns) and "
            f"(rows, {rank}). The rank is another ({CONFIG}, --lora-rank), or training saved parts of sharded matrices: save "
            "the adapter again."
        )
    change = LowRank(rank, settings.scale_of(module), embedding, a, b, found.get("magnitude"), found.get("bias"))
    if settings.dora != (change.magnitude is not None):
        says = "DoRA (use_dora)" if settings.dora else "plain LoRA"
        raise CheckpointError(
            f"{file}: {module} has {'no' if settings.dora else 'a'} lora_magnitude_vector, but the settings are of {says}. "
            f"Use the {CONFIG} that was saved with these weights."
        )
    vectors = {"lora_magnitude_vector": change.magnitude, "lora_B.bias": change.bias}
    for name, vector in vectors.items():
        if vector and vector[0].shape != (b[0].shape[0],):
            raise CheckpointError(
                f"{file}: {module}.{name} is {vector[0].shape}, expected ({b[0].shape[0]},). Save the adapter again."
            )
    return change


def _rows(file: Path, module: str, values: Weight, settings: Settings) -> Rows:
    at = settings.tokens_of(module)
    shape = values[0].shape
    if not at or len(shape) != 2 or len(at) != shape[0]:
        says = f"names {len(at)} rows" if at else "says nothing of them"
        raise CheckpointError(
            f"{file}: {module} has trained rows {shape}, but trainable_token_indices in {CONFIG} {says}. "
            f"Use the {CONFIG} that was saved with these weights."
        )
    return Rows(at, values)


def _require_effect(file: Path, module: str, change: LowRank) -> None:
    """Matrices that are finite, and whose product is not zero because one of them is, as before the first step of training."""
    for name, weight in (("lora_A", change.a), ("lora_B", change.b), ("lora_magnitude_vector", change.magnitude)):
        values = floats(weight[1]()) if weight else np.ones(1)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{file}: {module}.{name} holds numbers that are not finite: training diverged. Use an earlier checkpoint."
            )
        if not values.any():
            raise CheckpointError(
                f"{file}: {module}.{name} is all zeros, as before training: the adapter changes nothing there. "
                "Train it, or take the checkpoint that was saved after training."
            )


def floats(tensor: Tensor) -> np.ndarray:
    """A tensor's values as float32, to be changed at will."""
    values = tensor.float32()
    return values.copy() if np.may_share_memory(values, tensor.data) else values

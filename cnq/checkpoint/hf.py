"""A Hugging Face directory: config.json, tokenizer files, and weights in safetensors or .bin, one file or shards."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf.utility import SafetensorsLocal
from safetensors import SafetensorError, safe_open

from .. import archs
from ..archs.arch import DROPPED, Config
from ..errors import CheckpointError, listed
from ..gguf_file import BF16, F16, F32, Planned, Tensor, TensorType
from .checkpoint import ORIGIN_FILE, Checkpoint, Entry, Origin

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_FLOATS = {"F32": F32, "F16": F16, "BF16": BF16}
_EMBEDDING = "model.embed_tokens.weight"

# What a file of weights gives: what is known of a tensor, and how to read it.
Weight = tuple[Entry, Callable[[], Tensor]]
Weights = dict[str, Weight]


def open_hf(path: Path) -> Checkpoint:
    """Open a directory as a checkpoint; every file is looked at, no tensor is read.

    Raises CheckpointError (a file is missing, cut short or of another model), UnsupportedArch.
    """
    config = read_config(path)
    arch = archs.of_config(config)
    weights: Weights = {}
    for shard in _shards(path):
        found = read_weights(shard)
        if twice := weights.keys() & found.keys():
            raise CheckpointError(
                f"{path}: in more than one shard: {listed(sorted(twice))}. Remove the files of the other download."
            )
        weights |= found
    _require_indexed(path, set(weights))
    weights = {name: w for name, w in weights.items() if not name.endswith(DROPPED)}
    notes = []
    if config.get("vocab_size") != (rows := _embedding_rows(path, weights)):
        notes.append(f"config.json says vocab_size {config.get('vocab_size')}, the embedding has {rows} rows: {rows} it is")
        config["vocab_size"] = rows
    if config.get("tie_word_embeddings") and weights.pop("lm_head.weight", None):
        notes.append("lm_head.weight left out: config.json ties it to the embedding")
    return Checkpoint(
        path=path,
        arch=arch,
        config=config,
        entries={name: entry for name, (entry, _) in weights.items()},
        read=lambda name: weights[name][1](),
        tokenizer=lambda scratch: path,
        notes=tuple(notes),
        origin=read_origin(path),
    )


def read_origin(folder: Path) -> Origin | None:
    """What cnq_merge.json says, in a directory that has one. Raises CheckpointError when it is no JSON object."""
    if not (folder / ORIGIN_FILE).is_file():
        return None
    record = read_json(folder / ORIGIN_FILE)
    return Origin(record, lambda: record)


def _embedding_rows(path: Path, weights: Weights) -> int:
    if _EMBEDDING not in weights:
        raise CheckpointError(
            f"{path}: {_EMBEDDING} is missing among {len(weights)} tensors ({listed(weights, 2)}). "
            "The download is incomplete, or the model is of another family."
        )
    shape = weights[_EMBEDDING][0].shape
    if len(shape) != 2 or not shape[0]:
        raise CheckpointError(f"{path}: {_EMBEDDING} is {shape}, expected a row for each token. Download the model again.")
    return shape[0]


def read_config(path: Path) -> Config:
    """config.json of a model directory. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory. Give a Hugging Face model directory (config.json and weights).")
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            base = read_json(path / "adapter_config.json").get("base_model_name_or_path") or "BASE"
            raise CheckpointError(
                f"{path} is a LoRA adapter, not a model. Merge it into its base first: "
                f"python -m training.merge_lora {base} {path} OUT"
            )
        found = listed(sorted(p.name for p in path.iterdir())) or "nothing"
        raise CheckpointError(f"{path} has no config.json (it holds {found}). Give the directory of a complete model.")
    config = read_json(path / "config.json")
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{path} is quantized already ({method}). Start from the float checkpoint it was made from: "
            "what one quantization lost, another cannot bring back."
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object. Download it again.")
    return value


def _index(path: Path) -> tuple[Path, dict[str, str]] | None:
    """The shard index, safetensors before .bin: tensor name -> file name."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / name).is_file():
            files = read_json(path / name).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise CheckpointError(f"{path / name} has no weight_map. Download it again.")
            return path / name, files
    return None


def _shards(path: Path) -> list[Path]:
    if index := _index(path):
        index_path, files = index
        for name in files.values():
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                raise CheckpointError(
                    f"{index_path} names a file outside the model's directory: {name!r}. Do not use this download."
                )
        names = sorted(set(files.values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(names)} shards are missing: {listed(missing)}. Finish the download."
            )
        return [path / name for name in names]
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if found := sorted(path.glob(pattern)):
            return found
    if any(path.glob("consolidated.*.pth")):
        raise CheckpointError(
            f"{path} is in Meta's format (consolidated.*.pth), which this version of cnq does not read. "
            "Use the model's Hugging Face directory."
        )
    holds = listed(sorted(p.name for p in path.iterdir()))
    raise CheckpointError(
        f"{path} has no weights: neither model.safetensors nor pytorch_model.bin nor an index of shards (it holds {holds})."
    )


def _require_indexed(path: Path, found: set[str]) -> None:
    if index := _index(path):
        index_path, files = index
        if missing := sorted(files.keys() - found):
            shards = listed(sorted({files[name] for name in missing}))
            raise CheckpointError(
                f"{index_path} lists tensors that its shards lack: {listed(missing)}. Download {shards} again."
            )


def _float_type(path: Path, name: str, dtype: str) -> TensorType:
    if dtype not in _FLOATS:
        raise CheckpointError(
            f"{path}: {name} is {dtype}, expected F32, F16 or BF16. Start from the float checkpoint of the model."
        )
    return _FLOATS[dtype]


def read_weights(path: Path) -> Weights:
    """The tensors of one file, safetensors or .bin, none of them read. Raises CheckpointError."""
    return _safetensors(path) if path.suffix == ".safetensors" else _torch_pickle(path)


def _safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="np"):  # checks header, offsets and file size as the format demands
            local = SafetensorsLocal(path).tensors
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}). Download it again.") from None

    def read(name: str, type: TensorType, shape: tuple[int, ...]) -> Tensor:
        raw = np.asarray(local[name].mmap_bytes())
        return Tensor(name, type, shape, typed(raw, type, shape))

    weights: Weights = {}
    for name, tensor in local.items():
        if not name.endswith(DROPPED):
            entry = Entry(_float_type(path, name, tensor.dtype), tensor.shape)
            weights[name] = entry, partial(read, name, entry.type, entry.shape)
        else:
            weights[name] = Entry(F32, tensor.shape), partial(read, name, F32, tensor.shape)
    return weights


def _torch_pickle(path: Path) -> Weights:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a PyTorch file, which takes torch to read: pip install 'cnq[training]'. "
            "Or use the model's safetensors files, which need nothing."
        ) from None

    def plain(value: object) -> bool:
        """A tensor with all its numbers in the file: a stride of 0 can make any size out of one."""
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            return False
        return value.numel() * value.element_size() <= value.untyped_storage().nbytes()

    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        try:
            state = load(mmap=True)
        except RuntimeError:  # saved before torch 1.6: not a zip, cannot be mapped
            state = load()
    except Exception as error:  # torch raises half a dozen kinds for a damaged or hostile pickle
        # what was found comes after the advice to switch the protection off
        reason = (str(error).rpartition("WeightsUnpickler error: ")[2].splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is damaged, or not plain weights ({reason}). Use the model's safetensors files, or download it again."
        ) from None
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if not isinstance(state, dict) or (odd := [k for k, v in state.items() if not (isinstance(k, str) and plain(v))]):
        found = f"{odd[0]!r} is no tensor" if isinstance(state, dict) else f"it holds a {type(state).__name__}"
        raise CheckpointError(
            f"{path} is not plain weights: {found}, expected names and tensors. Use the model that save_pretrained wrote."
        )

    def read(name: str, entry: Entry) -> Tensor:
        raw = state[name].detach().contiguous().view(-1).view(torch.uint8).numpy()
        return Tensor(name, entry.type, entry.shape, typed(raw, entry.type, entry.shape))

    weights: Weights = {}
    for name, tensor in state.items():
        dtype = "F32" if name.endswith(DROPPED) else kinds.get(tensor.dtype, str(tensor.dtype))
        entry = Entry(_float_type(path, name, dtype), tuple(tensor.shape))
        weights[name] = entry, partial(read, name, entry)
    return weights


def typed(raw: np.ndarray, type: TensorType, shape: tuple[int, ...]) -> np.ndarray:
    """Raw bytes as Tensor.data wants them."""
    if type == BF16:
        return raw.reshape(*shape[:-1], 2 * shape[-1])
    return raw.view(np.float32 if type == F32 else np.float16).reshape(shape)


def write_safetensors(path: Path, tensors: list[Planned], progress: Callable[[int], object]) -> None:
    """Write one safetensors file tensor by tensor: the package's own writer wants them all in memory.

    Format: https://github.com/huggingface/safetensors/blob/v0.5.0/README.md#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {"dtype": t.type.name, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            for chunk in t.chunks():
                out.write(chunk.data)
                progress(chunk.nbytes)

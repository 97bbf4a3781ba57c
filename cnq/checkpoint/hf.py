"""A Hugging Face directory: config.json, tokenizer files, and weights in safetensors or .bin, one file or shards."""

import json
import shutil
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
from ..gguf_file import F32, Planned, Tensor, TensorType
from .checkpoint import ORIGIN_FILE, Checkpoint, Entry, Origin, Weights, float_type, typed
from .torch_file import read_torch

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


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
    if config.get("vocab_size") != (rows := _embedding_rows(path, weights, arch.hf_name("token_embd.weight"))):
        notes.append(f"config.json says vocab_size {config.get('vocab_size')}, the embedding has {rows} rows: {rows} it is")
        config["vocab_size"] = rows
    if config.get("tie_word_embeddings") and weights.pop(head := arch.hf_name("output.weight"), None):
        notes.append(f"{head} left out: config.json ties it to the embedding")
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


def has_weights(path: Path) -> bool:
    """Whether a directory holds a model of Hugging Face's form, complete or not."""
    return (path / "config.json").is_file() and bool(_index(path) or _unindexed(path))


def _embedding_rows(path: Path, weights: Weights, embedding: str) -> int:
    if embedding not in weights:
        raise CheckpointError(
            f"{path}: {embedding} is missing among {len(weights)} tensors ({listed(weights, 2)}). "
            "The download is incomplete, or the model is of another family."
        )
    shape = weights[embedding][0].shape
    if len(shape) != 2 or not shape[0]:
        raise CheckpointError(f"{path}: {embedding} is {shape}, expected a row for each token. Download the model again.")
    return shape[0]


def read_config(path: Path) -> Config:
    """config.json of a model directory. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no directory, nor a file. Give a model directory (config.json and weights) or a GGUF."
        )
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


def _unindexed(path: Path) -> list[Path]:
    """Files of weights by their names, safetensors before .bin."""
    found = (sorted(path.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin"))
    return next((files for files in found if files), [])


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
    if found := _unindexed(path):
        return found
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


def read_weights(path: Path) -> Weights:
    """The tensors of one file, safetensors or .bin, none of them read. Raises CheckpointError."""
    return _safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


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
            entry = Entry(float_type(path, name, tensor.dtype), tensor.shape)
            weights[name] = entry, partial(read, name, entry.type, entry.shape)
        else:
            weights[name] = Entry(F32, tensor.shape), partial(read, name, F32, tensor.shape)
    return weights


def copy_tokenizer(src: Path, dst: Path) -> None:
    """Copy a tokenizer's files from one folder to another."""
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)
    if (templates := src / "additional_chat_templates").is_dir():
        shutil.copytree(templates, dst / templates.name)


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

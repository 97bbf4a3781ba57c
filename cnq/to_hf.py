"""Any checkpoint → a Hugging Face directory: config.json, tokenizer files and safetensors, so that all take the same road."""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.checkpoint import write_origin
from .checkpoint.hf import copy_tokenizer, write_safetensors
from .files import replacing, require_replaceable
from .gguf_file import BF16, F16, F32, Planned, TensorType, encoded

DTYPES = {"f16": F16, "bf16": BF16, "f32": F32}
_FILES_ROOM = 64 << 20  # bytes: tokenizer and config


@dataclass(frozen=True)
class Restored:
    """dtype: type of the matrices. decoded: how many of them were quantized, and are as exact as their quantization was.

    notes: what was put right on the way.
    """

    path: Path
    arch: str
    dtype: str
    n_tensors: int
    decoded: int
    nbytes: int
    notes: tuple[str, ...]
    seconds: float


def to_hf(src: Path, dst: Path, **options: Any) -> Restored:
    """Write the checkpoint `src` (GGUF, Meta's layout, Hugging Face's) as the directory `dst`; options: write_hf's.

    Raises what open_checkpoint and write_hf raise.
    """
    return write_hf(open_checkpoint(src), dst, **options)


def write_hf(
    checkpoint: Checkpoint,
    dst: Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Restored:
    """Write a checkpoint as the Hugging Face directory `dst`, one tensor in memory at a time.

    dtype: f16, bf16, f32, or auto = every tensor keeps its own, bit for bit. A GGUF's matrices give auto its meaning (f16 when
    they are quantized). Vectors and routers, which a GGUF holds in float32, are narrowed with the matrices unless that
    would lose a bit: an HF checkpoint comes back as it went in.
    max_shard_bytes: of one safetensors file, unless a single tensor is larger. progress: called with bytes written and in all.
    Raises GgufError (a value that is not finite), UnsupportedVocab, CheckpointError, OutputExists, NoSpace.
    """
    started = time.perf_counter()
    links = [link for made_of in checkpoint.placed().values() for link in made_of]
    widened = {link.hf for link in links if link.float32 or len(link.shape) == 1}
    matrices = [e.type for e in checkpoint.entries.values() if len(e.shape) > 1]
    target = _target(checkpoint, matrices[0], dtype)
    planned = [_plan(checkpoint, name, target, name in widened) for name in checkpoint.entries]
    written = target or matrices[0]
    total = sum(t.nbytes for t in planned)
    done = 0

    def wrote(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    with replacing(dst, force=force, need=total + _FILES_ROOM, folder=True) as folder:
        require_replaceable(dst, checkpoint.path, "config.json")
        folder.mkdir()
        _copy_files(checkpoint, folder)
        config = {key: value for key, value in checkpoint.config.items() if key != "dtype"}  # transformers 5's torch_dtype
        config["torch_dtype"] = {F16: "float16", BF16: "bfloat16", F32: "float32"}[written]
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        write_shards(folder, planned, max_shard_bytes, wrote)
        write_origin(checkpoint, folder)
    return Restored(
        path=dst,
        arch=checkpoint.arch.gguf,
        dtype=written.name,
        n_tensors=len(planned),
        decoded=sum(e.decoded for e in checkpoint.entries.values()),
        nbytes=total,
        notes=checkpoint.notes,
        seconds=time.perf_counter() - started,
    )


def _copy_files(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer's files, and what else of a model's directory transformers reads beside config.json and weights."""
    tokenizer = checkpoint.tokenizer(folder)
    if tokenizer != folder:
        copy_tokenizer(tokenizer, folder)
    if checkpoint.path.is_dir():
        own_code = checkpoint.path.glob("*.py") if "auto_map" in checkpoint.config else ()
        for file in (checkpoint.path / "generation_config.json", *own_code):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _target(checkpoint: Checkpoint, matrix: TensorType, dtype: str) -> TensorType | None:
    """The type that tensors are brought to; None = each stays as it is."""
    if dtype != "auto":
        return DTYPES[dtype]
    if checkpoint.path.is_dir():
        return None
    return matrix if matrix in DTYPES.values() else F16


def _plan(checkpoint: Checkpoint, name: str, target: TensorType | None, widened: bool) -> Planned:
    """widened: a GGUF holds the tensor in float32, whatever type it was in."""
    entry = checkpoint.entries[name]
    type = target or entry.type
    if widened and type not in (F32, entry.type):
        values = checkpoint.read(name).float32().reshape(-1)
        narrowed = np.concatenate([_widened(c, type) for c in encoded(checkpoint.read(name), type)])
        type = type if np.array_equal(narrowed, values) else F32

    def chunks() -> Iterable[np.ndarray]:
        return encoded(checkpoint.read(name), type)

    return Planned(name, type, entry.shape, chunks)


def _widened(chunk: np.ndarray, type: TensorType) -> np.ndarray:
    if type == BF16:
        return (chunk.reshape(-1).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return chunk.reshape(-1).astype(np.float32)


def write_shards(folder: Path, planned: list[Planned], max_bytes: int, wrote: Callable[[int], object]) -> None:
    """One file, or as many as max_bytes asks for, with the index that transformers reads."""
    shards: list[list[Planned]] = [[]]
    for t in planned:
        if shards[-1] and sum(x.nbytes for x in shards[-1]) + t.nbytes > max_bytes:
            shards.append([])
        shards[-1].append(t)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], wrote)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, wrote)
    index = {
        "metadata": {
            "total_size": sum(t.nbytes for t in planned),
            "total_parameters": sum(prod(t.shape) for t in planned),
        },
        "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

"""GGUF → Hugging Face checkpoint: config.json, tokenizer files and safetensors, so that any model takes the same road."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint, open_gguf
from .checkpoint.hf import write_safetensors
from .errors import OutputExists
from .files import replacing
from .gguf_file import BF16, F16, F32, Planned, TensorType, encoded

DTYPES = {"f16": F16, "bf16": BF16, "f32": F32}
_FILES_ROOM = 64 << 20  # bytes: tokenizer and config


@dataclass(frozen=True)
class Restored:
    """dtype: type of the matrices. decoded: how many of them were quantized, and are as exact as their quantization was."""

    path: Path
    arch: str
    dtype: str
    n_tensors: int
    decoded: int
    nbytes: int
    seconds: float


def to_hf(
    src: Path,
    dst: Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Restored:
    """Write the GGUF `src` as the directory `dst`.

    dtype: f16, bf16, f32, or auto = what the GGUF's matrices are in (f16 when they are quantized). Vectors and routers, which
    a GGUF holds in float32, are narrowed too unless that would lose a bit: an HF checkpoint comes back as it went in.
    Raises GgufError, UnsupportedArch, UnsupportedVocab, CheckpointError, OutputExists, NoSpace.
    """
    started = time.perf_counter()
    checkpoint = open_gguf(src)
    links = [link for made_of in checkpoint.placed().values() for link in made_of]
    widened = {link.hf for link in links if link.float32 or len(link.shape) == 1}
    matrices = [e.type for e in checkpoint.entries.values() if len(e.shape) > 1]
    target = DTYPES[dtype] if dtype != "auto" else matrices[0] if matrices[0] in DTYPES.values() else F16
    planned = [_plan(checkpoint, name, target, name in widened) for name in checkpoint.entries]
    total = sum(t.nbytes for t in planned)
    done = 0

    def wrote(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    with replacing(dst, force=force, need=total + _FILES_ROOM, folder=True) as folder:
        _require_replaceable(src, dst)
        folder.mkdir()
        checkpoint.tokenizer(folder)
        config = checkpoint.config | {"torch_dtype": {F16: "float16", BF16: "bfloat16", F32: "float32"}[target]}
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        _write_shards(folder, planned, max_shard_bytes, wrote)
    return Restored(
        path=dst,
        arch=checkpoint.arch.gguf,
        dtype=target.name,
        n_tensors=len(planned),
        decoded=sum(e.decoded for e in checkpoint.entries.values()),
        nbytes=total,
        seconds=time.perf_counter() - started,
    )


def _require_replaceable(src: Path, dst: Path) -> None:
    """--force replaces a checkpoint, not a folder with anything else in it."""
    if dst.is_dir() and (src.resolve().is_relative_to(dst.resolve()) or not _is_checkpoint(dst)):
        raise OutputExists(f"{dst} is a folder with other things in it. Name another output.")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() or not any(folder.iterdir())


def _plan(checkpoint: Checkpoint, name: str, target: TensorType, widened: bool) -> Planned:
    """widened: the GGUF holds the tensor in float32, whatever type it was in."""
    shape = checkpoint.entries[name].shape
    type = target
    if widened and target != F32:
        values = checkpoint.read(name).float32().reshape(-1)
        narrowed = np.concatenate([_widened(c, target) for c in encoded(checkpoint.read(name), target)])
        type = target if np.array_equal(narrowed, values) else F32

    def chunks() -> Iterable[np.ndarray]:
        return encoded(checkpoint.read(name), type)

    return Planned(name, type, shape, chunks)


def _widened(chunk: np.ndarray, type: TensorType) -> np.ndarray:
    if type == BF16:
        return (chunk.reshape(-1).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return chunk.reshape(-1).astype(np.float32)


def _write_shards(folder: Path, planned: list[Planned], max_bytes: int, wrote: Callable[[int], object]) -> None:
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

"""Adapter → GGUF that llama.cpp lays over its base at run time: the tensors of convert_lora_to_gguf.py, to the bit."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import isclose, sqrt
from pathlib import Path

import gguf
import numpy as np

from .adapters import Adapter, LowRank, read_adapter
from .adapters.adapter import floats
from .adapters.plan import plan
from .archs.tensors import Link, grouped
from .checkpoint import Checkpoint, open_checkpoint
from .convert import DTYPES, described
from .errors import CheckpointError, listed
from .files import replacing
from .gguf_file import F16, F32, Planned, Tensor, TensorType, encoded, write


@dataclass(frozen=True)
class ConvertedLora:
    """n_modules: matrices that the adapter changes. alpha: as llama.cpp wants it, which divides it by each matrix's rank."""

    path: Path
    arch: str
    dtype: str
    n_modules: int
    alpha: float
    nbytes: int
    notes: tuple[str, ...]
    seconds: float


def convert_lora(src: Path, dst: Path, *, base: Path, dtype: str = "f32", force: bool = False) -> ConvertedLora:
    """Write the adapter `src` as the GGUF `dst`.

    base: the checkpoint it was trained on, which says what each module is called. dtype: f32, f16, bf16 or q8_0.
    Raises CheckpointError for what such a GGUF cannot hold (whole modules, a grown vocabulary, biases, DoRA), and what
    open_checkpoint, read_adapter and replacing raise.
    """
    started = time.perf_counter()
    checkpoint, adapter = open_checkpoint(base), read_adapter(src)
    plan(checkpoint, [adapter], None)  # the adapter is of this base
    _require_expressible(checkpoint, adapter)
    settings = adapter.settings
    alpha = settings.alpha * (sqrt(settings.rank) if settings.rslora else 1)
    tensors = _tensors(checkpoint, adapter, alpha, DTYPES[dtype])
    writer = gguf.GGUFWriter(path=None, arch=checkpoint.arch.gguf)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    general, notes = described(adapter.path, None, adapter.path, [])
    general.set_gguf_meta_model(writer)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with replacing(dst, force=force, need=sum(t.nbytes for t in tensors)) as partial_path:
        write(partial_path, writer, tensors, lambda n: None)
    return ConvertedLora(
        path=dst,
        arch=checkpoint.arch.gguf,
        dtype=dtype,
        n_modules=len(adapter.low_rank),
        alpha=alpha,
        nbytes=dst.stat().st_size,
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )


def _require_expressible(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Low-rank changes and nothing else, of matrices that the GGUF of the base has by themselves."""
    biased = [module for module, change in adapter.low_rank.items() if change.bias]
    links = (link for link in checkpoint.arch.links(checkpoint.config) if link.hf.removesuffix(".weight") in adapter.low_rank)
    altered = [link.hf for link in links if link.unit_rows or link.expert is not None]
    reason = ""
    if adapter.settings.dora:
        reason = "is DoRA, whose lengths llama.cpp has no place for"
    elif whole := [name for name in adapter.whole if not _is_the_bases(checkpoint, adapter, name)]:
        reason = f"holds whole tensors ({listed(whole)})"
    elif adapter.rows:
        reason = f"holds rows of {listed(adapter.rows)}"
    elif altered:
        reason = f"changes {listed(altered)}, which the GGUF does not have as they are"
    elif biased:
        reason = f"has biases ({listed(biased)})"
    elif checkpoint.config.get("tie_word_embeddings"):
        names = map(checkpoint.arch.hf_name, ("token_embd.weight", "output.weight"))
        if tied := [name for name in names if name.removesuffix(".weight") in adapter.low_rank]:
            reason = f"changes {listed(tied)}, which share their rows in this base"
    if reason:
        raise CheckpointError(
            f"{adapter.path} {reason}: a LoRA in GGUF holds low-rank changes only. Merge it instead: "
            f"python -m training.merge_lora {checkpoint.path} {adapter.path} OUT; or cnq convert {checkpoint.path} OUT.gguf "
            f"--lora {adapter.path}"
        )


def _is_the_bases(checkpoint: Checkpoint, adapter: Adapter, name: str) -> bool:
    """Whether a whole tensor is the base's own: PEFT saves the embedding beside its low-rank change."""
    ours, theirs = checkpoint.entries.get(name), adapter.whole[name][0]
    if name in adapter.apart or ours is None or ours.shape != theirs.shape:
        return False
    saved = encoded(adapter.whole[name][1](), F32)
    return all(np.array_equal(a, b) for a, b in zip(encoded(checkpoint.read(name), F32), saved, strict=True))


def _tensors(checkpoint: Checkpoint, adapter: Adapter, alpha: float, target: TensorType) -> list[Planned]:
    links = grouped(checkpoint.arch.links(checkpoint.config), "hf")
    planned = []
    for link, change in ((link, change) for module, change in adapter.low_rank.items() for link in links[f"{module}.weight"]):
        # llama.cpp's scale is alpha / rank for all; what patterns make of it in a module goes into its b
        factor = change.scale * change.rank / alpha
        factor = 1.0 if isclose(factor, 1.0) else factor
        for side, shape, chunks in (
            ("a", change.a[0].shape[::-1] if change.embedding else change.a[0].shape, partial(_a, change)),
            ("b", change.b[0].shape if change.embedding else (link.shape[0], change.rank), partial(_b, change, link, factor)),
        ):
            type = target if shape[-1] % target.block == 0 else F16
            planned.append(Planned(f"{link.gguf}.lora_{side}", type, shape, partial(_chunks, chunks, shape, type)))
    return planned


def _a(change: LowRank) -> np.ndarray:
    """(rank, columns); of an embedding, whose rows are looked up, (rows, rank): llama.cpp's llama-graph.cpp, build_inp_embd."""
    a = change.a[1]().float32()
    return np.ascontiguousarray(a.T) if change.embedding else a


def _b(change: LowRank, link: Link, factor: float) -> np.ndarray:
    """(rows, rank): the rows of the GGUF's matrix, in its order."""
    b = floats(change.b[1]())
    if factor != 1.0:
        b *= np.float32(factor)
    return b if change.embedding else link.forward(b)


def _chunks(make: partial[np.ndarray], shape: tuple[int, ...], type: TensorType) -> Iterable[np.ndarray]:
    return encoded(Tensor("LoRA", F32, shape, make()), type)

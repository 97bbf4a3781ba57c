"""Checkpoint → float GGUF: the bytes that llama.cpp's convert_hf_to_gguf.py writes, one tensor in memory at a time."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from . import prompts
from . import vocab as vocabs
from .adapters import merge, read_adapter
from .archs.hparams import hparams, llama3_factors, remarks
from .archs.tensors import Link, gguf_shape, unit_rows
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.checkpoint import ORIGIN_KEY
from .files import replacing, require_memory
from .gguf_file import BF16, F16, F32, Q8_0, Planned, Tensor, TensorType, encoded, rewrite, write

DTYPES = {"f16": F16, "bf16": BF16, "f32": F32, "q8_0": Q8_0}
_FTYPES = {F32: 0, F16: 1, Q8_0: 7, BF16: 32}  # llama.h, enum llama_ftype
_META_ROOM = 64 << 20  # bytes: a vocabulary with its merges


@dataclass(frozen=True)
class Converted:
    """dtype: type of the matrices; vectors are F32. notes: what was put right on the way."""

    path: Path
    arch: str
    dtype: str
    n_tensors: int
    n_params: int
    n_vocab: int
    nbytes: int
    notes: tuple[str, ...]
    seconds: float


def convert(
    src: Path,
    dst: Path,
    *,
    dtype: str = "auto",
    name: str | None = None,
    format: str | None = None,
    loras: Sequence[Path] = (),
    force: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Converted:
    """Write the checkpoint `src` (directory of Hugging Face or in Meta's layout, or a GGUF to be decoded) as the GGUF `dst`.

    dtype: f16, bf16, f32, q8_0, or auto = what the checkpoint's matrices are in (f16 for f32).
    name: general.name; None = from the model card or the directory's name, as the reference converter does.
    format: prompt format whose template the GGUF gets when the checkpoint has none (cnq.prompts).
    loras: adapters to merge on the way, in this order: the same bytes as by way of a merged checkpoint (cnq.adapters).
    progress: called with bytes written and bytes in all.
    Raises CheckpointError, UnsupportedArch, UnsupportedVocab, GgufError (a value that is not finite), OutputExists, NoSpace.
    """
    started = time.perf_counter()
    checkpoint, model_card = open_checkpoint(src), src if src.is_dir() else None
    merging = None
    if loras:
        merging = merge(checkpoint, [read_adapter(path) for path in loras])
        require_memory(merging.memory, f"merge into {src}")
        checkpoint, model_card = merging.checkpoint, None  # the base's model card is not the merged model's
        name = name or loras[-1].resolve().name
    target = _auto(checkpoint) if dtype == "auto" else DTYPES[dtype]
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint.tokenizer(Path(scratch))
        vocab = vocabs.load(folder, checkpoint.config["vocab_size"])
    if vocab.chat_template is None and format:
        vocab.chat_template = prompts.named(format).jinja
    tensors = _plan(checkpoint, target)
    writer, more_notes = _metadata(checkpoint, vocab, target, tensors, name, model_card)
    total = sum(t.nbytes for t in tensors)
    done = 0

    def wrote(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    with replacing(dst, force=force, need=total + _META_ROOM) as partial_path:
        write(partial_path, writer, tensors, wrote)
        if checkpoint.origin:
            rewrite(partial_path, ORIGIN_KEY, json.dumps(checkpoint.origin.seal()))
    return Converted(
        path=dst,
        arch=checkpoint.arch.gguf,
        dtype=target.name,
        n_tensors=len(tensors),
        n_params=sum(prod(t.shape) for t in tensors),
        n_vocab=len(vocab.tokens),
        nbytes=dst.stat().st_size,
        notes=(*checkpoint.notes, *vocab.notes, *more_notes, *(merging.notes() if merging else ())),
        seconds=time.perf_counter() - started,
    )


def _auto(checkpoint: Checkpoint) -> TensorType:
    """The type of the first matrix: config.json's torch_dtype is often wrong after fine-tuning."""
    kinds = [e.type for e in checkpoint.entries.values() if len(e.shape) > 1]
    return BF16 if kinds[:1] == [BF16] else F16


def _plan(checkpoint: Checkpoint, target: TensorType) -> list[Planned]:
    """Every tensor with its type: vectors and routers F32, matrices `target`, or F16 where rows do not fill its blocks."""
    planned = []
    if (factors := llama3_factors(checkpoint.config)) is not None:
        planned.append(Planned("rope_freqs.weight", F32, factors.shape, lambda: [factors]))
    for name, links in checkpoint.placed().items():
        shape = gguf_shape(links)
        wide = len(shape) == 1 or links[0].float32
        type = F32 if wide else target if shape[-1] % target.block == 0 else F16
        planned.append(Planned(name, type, shape, partial(_chunks, checkpoint, links, type)))
    return planned


def _chunks(checkpoint: Checkpoint, links: list[Link], type: TensorType) -> Iterator[np.ndarray]:
    for link in links:
        found = checkpoint.read(link.hf)
        moved = Tensor(link.hf, found.type, link.shape, link.forward(found.data))
        yield from encoded(moved, type, unit_rows if link.unit_rows else None)


def _metadata(
    checkpoint: Checkpoint,
    vocab: vocabs.Vocab,
    target: TensorType,
    tensors: list[Planned],
    name: str | None,
    model_card: Path | None,
) -> tuple[gguf.GGUFWriter, list[str]]:
    """All keys, in the reference converter's order; and notes."""
    config, arch = checkpoint.config, checkpoint.arch
    writer = gguf.GGUFWriter(path=None, arch=arch.gguf)
    writer.add_type(gguf.GGUFType.MODEL)
    general, notes = described(checkpoint.path, name, model_card, tensors)
    if checkpoint.origin:
        general.base_models = _parents(checkpoint.origin.planned)
    general.set_gguf_meta_model(writer)
    if checkpoint.origin:
        writer.add_string(ORIGIN_KEY, json.dumps(checkpoint.origin.planned))
    for key, kind, value in hparams(config, arch):
        getattr(writer, f"add_{kind}")(f"{arch.gguf}.{key}", value)
    writer.add_file_type(_FTYPES[target])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocab.add_to(writer)
    return writer, [*notes, *remarks(config, arch)]


def _parents(record: dict[str, Any]) -> list[dict[str, str]]:
    """general.base_model.*: the base, then the adapters in the order they were merged in."""
    adapters = record.get("adapters")
    merged = [record.get("base"), *(adapters if isinstance(adapters, list) else [])]
    names = [
        str(part["name"]).encode(errors="replace").decode() for part in merged if isinstance(part, dict) and part.get("name")
    ]
    return [
        {"name": name, "organization": owner} if owner else {"name": name}
        for owner, _, name in (name.rpartition("/") for name in names)
    ]


def described(path: Path, name: str | None, model_card: Path | None, tensors: list[Planned]) -> tuple[gguf.Metadata, list[str]]:
    """Authorship, licence and size, from the model card and config.json in a folder, and a name or the path's; and notes."""
    counter = gguf.GGUFWriter(path=None, arch="")
    for t in tensors:
        counter.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=gguf.GGMLQuantizationType(t.type.id))
    n_params, shared, in_experts, n_experts = counter.get_total_parameter_count()
    path = path.resolve() if path.name in ("", "..") else path  # "." has no name

    def load(folder: Path | None) -> gguf.Metadata:
        metadata = gguf.Metadata.load(None, folder, name, n_params)
        metadata.name = metadata.name or path.stem
        if n_params:
            metadata.size_label = metadata.size_label or gguf.size_label(n_params, shared, in_experts, n_experts)
        return metadata

    try:
        metadata = load(model_card and path)
        metadata.set_gguf_meta_model(trial := gguf.GGUFWriter(path=None, arch=""))
        for value in trial.kv_data[0].values():
            trial._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)
    except Exception as error:  # these files are free text, and the package believes every word
        return load(None), [f"README.md or another description of the model is malformed, and left out: {error!r}"]
    return metadata, []

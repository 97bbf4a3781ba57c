"""A GGUF back as a checkpoint under Hugging Face's names: the way in for models that exist as GGUF only."""

import json
from pathlib import Path

import numpy as np

from .. import archs, vocab
from ..archs.arch import Arch, head_dim
from ..archs.hparams import config_of, hparams, llama3_factors
from ..archs.tensors import Link, gguf_shape, grouped, pack
from ..errors import CheckpointError, listed
from ..gguf_file import BF16, F16, F32, GgufFile, Tensor, TensorType
from .checkpoint import ORIGIN_KEY, Checkpoint, Entry, Origin, require_shape

_EMBEDDING, _HEAD, _ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
_FLOATS = (F32, F16, BF16)


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF of a known family; tensors keep the type they have in the file, rows go back to HF's order.

    Raises GgufError, UnsupportedArch, CheckpointError (tensors that no checkpoint of the family has).
    """
    file = GgufFile(path)
    arch = archs.of_gguf(file.arch, file.fields.get(f"{file.arch}.expert_count", 0))
    config = config_of(file.fields, arch)
    if _EMBEDDING not in file.tensors:
        raise CheckpointError(
            f"{path} has no {_EMBEDDING}: it holds a vocabulary or an adapter. Give the GGUF of a complete model."
        )
    config["vocab_size"] = file.tensors[_EMBEDDING].shape[0]
    config["tie_word_embeddings"] = _HEAD not in file.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    for name in ("bos", "eos"):
        if (key := f"tokenizer.ggml.{name}_token_id") in file.fields:
            config[f"{name}_token_id"] = file.fields[key]
    arch.check(config)
    for _ in hparams(config, arch):  # raises for rotary settings that config.json cannot say
        pass
    if _ROPE in file.tensors:
        config["rope_scaling"] = _llama3_scaling(path, file, config)
    links = list(arch.links(config))
    _require_known(file, arch, grouped(links, "gguf"))
    whole = {hf: of for hf, of in grouped(links, "hf").items() if all(link.gguf in file.tensors for link in of)}
    shapes = arch.expected(config)

    def tokenizer(scratch: Path) -> Path:
        vocab.write(file.fields, scratch)
        return scratch

    return Checkpoint(
        path=path,
        arch=arch,
        config=config,
        entries={hf: _entry(file, of, shapes[hf]) for hf, of in whole.items()},
        read=lambda name: _read(file, whole[name]),
        tokenizer=tokenizer,
        origin=_origin(file),
    )


def _require_known(file: GgufFile, arch: Arch, by_gguf: dict[str, list[Link]]) -> None:
    """Raise CheckpointError for a tensor that is no tensor of the family, or of another shape than the metadata says."""
    if unknown := file.tensors.keys() - by_gguf.keys() - {_ROPE}:
        raise CheckpointError(
            f"{file.path}: tensors that {arch.classes[0]} does not have: {listed(sorted(unknown))}. "
            "It is of a variant that cnq does not know: take the model's own checkpoint."
        )
    for name, links in by_gguf.items():
        if name in file.tensors:
            found, shape = file.tensors[name].shape, gguf_shape(links)
            dropped = (1,) * (len(shape) - len(found))  # ggml writes no last dimensions of 1: a single expert
            require_shape(file.path, name, dropped + found, shape, "its metadata")


def _entry(file: GgufFile, links: list[Link], shape: tuple[int, ...]) -> Entry:
    types = [file.tensors[link.gguf].type for link in links]
    return Entry(_one_type(types), shape, decoded=any(type not in _FLOATS for type in types))


def _one_type(types: list[TensorType]) -> TensorType:
    """The type of a tensor put together from parts: theirs, or float32 when they differ."""
    return types[0] if len(set(types)) == 1 else F32


def _read(file: GgufFile, links: list[Link]) -> Tensor:
    """One HF tensor, of the GGUF tensors that hold its rows."""
    parts = [_part(file, link) for link in links]
    if len(parts) == 1:
        return parts[0]
    type = _one_type([part.type for part in parts])
    data = pack([part.data if part.type == type else part.float32() for part in parts], links[0].groups)
    return Tensor(links[0].hf, type, (len(data), *parts[0].shape[1:]), data)


def _part(file: GgufFile, link: Link) -> Tensor:
    found = file.tensor(link.gguf)
    data = found.data
    if link.expert is not None:
        data = data.reshape(-1, *link.shape[:-1], data.shape[-1])[link.expert]
    return Tensor(link.hf, found.type, link.shape, link.back(data))


def _origin(file: GgufFile) -> Origin | None:
    try:
        record = json.loads(file.fields[ORIGIN_KEY])
    except (KeyError, TypeError, ValueError, RecursionError):  # a note for people, nothing hangs on it
        return None
    return Origin(record, lambda: record) if isinstance(record, dict) else None


def _llama3_scaling(path: Path, file: GgufFile, config: dict[str, object]) -> dict[str, object]:
    """The rope_scaling that gives the file's frequency factors, with LLaMA 3's blend between wavelengths 1 and 4.

    The largest factor is `factor`; the trained context is found by trying (8192 for LLaMA 3.1 and 3.2).
    """
    factors = file.tensor(_ROPE).float32()
    plausible = factors.shape == (head_dim(config) // 2,) and bool(np.isfinite(factors).all() and factors.min() > 0)
    for original in (8192, *(64 << n for n in range(12))) if plausible else ():
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        made = llama3_factors({**config, "rope_scaling": scaling})
        if made is not None and abs(made - factors).max() < 1e-5:
            return scaling
    raise CheckpointError(f"{path}: {_ROPE} holds frequency factors that are not LLaMA 3's; config.json cannot say them.")

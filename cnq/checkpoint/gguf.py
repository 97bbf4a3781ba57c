"""A GGUF back as a checkpoint under Hugging Face's names: the way in for models that exist as GGUF only."""

import json
from pathlib import Path

import numpy as np

from .. import archs, vocab
from ..archs.arch import config_of, head_dim, hparams, llama3_factors
from ..errors import CheckpointError, listed
from ..gguf_file import GgufFile, Tensor
from .checkpoint import ORIGIN_KEY, Checkpoint, Entry, Origin

_EMBEDDING, _HEAD, _ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF of a known family; tensors keep the type they have in the file, rows go back to HF's order.

    Raises GgufError, UnsupportedArch, CheckpointError (tensors that no checkpoint of the family has).
    """
    file = GgufFile(path)
    arch = archs.of_gguf(file.arch)
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
    rules = {hf: (gguf, to) for hf, gguf, to, _ in arch.expected(config)}
    unknown = file.tensors.keys() - {gguf for gguf, _ in rules.values()} - {_ROPE}
    if unknown:
        raise CheckpointError(
            f"{path}: tensors that {arch.classes[0]} does not have: {listed(sorted(unknown))}. "
            "It is of a variant that cnq does not know: take the model's own checkpoint."
        )

    def read(name: str) -> Tensor:
        gguf, to = rules[name]
        found = file.tensor(gguf)
        return Tensor(name, found.type, found.shape, to.back(found.data, config))

    def tokenizer(scratch: Path) -> Path:
        vocab.write(file.fields, scratch)
        return scratch

    entries = {
        hf: Entry(file.tensors[gguf].type, file.tensors[gguf].shape) for hf, (gguf, _) in rules.items() if gguf in file.tensors
    }
    return Checkpoint(
        path=path, arch=arch, config=config, entries=entries, read=read, tokenizer=tokenizer, origin=_origin(file)
    )


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

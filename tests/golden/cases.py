"""The tiny checkpoints whose conversion is compared with llama.cpp's, and the fingerprint that is compared."""

import hashlib
from pathlib import Path
from typing import Any

import tiny

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 256}  # fmt: skip
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32, "beta_slow": 1}

CASES: dict[str, dict[str, Any]] = {
    f"{family}-{vocab}-{dtype.lower()}": {"family": family, "vocab": vocab, "dtype": dtype}
    for family in ("llama", "qwen2")
    for vocab in ("spm-added", "llama-bpe" if family == "llama" else "qwen2")
    for dtype in ("F16", "BF16", "F32")
} | {
    "llama-no-gqa": {"family": "llama", "vocab": "spm", "num_key_value_heads": 4},
    "llama-json-only": {"family": "llama", "vocab": "spm-json"},
    "llama-tied-sharded": {"family": "llama", "vocab": "smollm", "tie_word_embeddings": True, "shards": 3},
    "llama-rope-llama3": {"family": "llama", "vocab": "llama-bpe", "rope_theta": 500000.0, "rope_scaling": _LLAMA3},
    "llama-rope-linear": {"family": "llama", "vocab": "spm", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-rope-yarn": {"family": "llama", "vocab": "spm", "rope_scaling": _YARN},
    "llama-head-dim": {"family": "llama", "vocab": "spm", "head_dim": 32},
    "llama-biases": {"family": "llama", "vocab": "spm", "attention_bias": True, "mlp_bias": True},
    "llama-gpt-2": {"family": "llama", "vocab": "gpt-2"},
    "llama-deepseek-llm": {"family": "llama", "vocab": "deepseek-llm"},
    "qwen2-tied-yarn": {"family": "qwen2", "vocab": "qwen2", "tie_word_embeddings": True, "rope_scaling": _YARN},
    "llama-rope-dynamic": {"family": "llama", "vocab": "spm", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama-yi": {"family": "llama", "vocab": "spm-symbols", "rope_theta": 5000000.0},
    "mistral-spm-bf16": {"family": "mistral", "vocab": "spm", "dtype": "BF16", "sliding_window": 256},
    "mistral-tekken": {"family": "mistral", "vocab": "tekken", "head_dim": 32},
    "mixtral-spm-f16": {"family": "mixtral", "vocab": "spm"},
    "mixtral-spm-f32": {"family": "mixtral", "vocab": "spm", "dtype": "F32", "shards": 3},
    "qwen3-bf16": {"family": "qwen3", "vocab": "qwen2", "dtype": "BF16"},
    "qwen3-tied": {"family": "qwen3", "vocab": "qwen2", "tie_word_embeddings": True},
    "internlm2-f16": {"family": "internlm2", "vocab": "spm-unused", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "internlm2-bf16": {"family": "internlm2", "vocab": "spm", "dtype": "BF16", "num_key_value_heads": 1},
    "baichuan-7b": {"family": "baichuan-7b", "vocab": "spm"},
    "baichuan2-7b": {"family": "baichuan2-7b", "vocab": "spm"},
}


def outtypes(case: str) -> tuple[str, ...]:
    """Of Baichuan's 32 layers one type is enough: the other cases show the types."""
    return ("f16",) if case.startswith("baichuan") else ("f16", "bf16", "f32", "q8_0")


def make(case: str, folder: Path) -> Path:
    """The case's checkpoint, in a directory of its own name: the name is part of the metadata."""
    return tiny.checkpoint(folder / case, **CASES[case])


def fingerprint(gguf: Path) -> dict[str, dict[str, Any]]:
    """Every tensor as "type shape sha256", every key as its type and value (long lists: their sha256)."""
    from cnq.gguf_file import GgufFile

    file = GgufFile(gguf)
    tensors = {}
    for name in file.tensors:
        tensor = file.tensor(name)
        shape = "x".join(map(str, tensor.shape))
        tensors[name] = f"{tensor.type.name} {shape} {hashlib.sha256(tensor.data.tobytes()).hexdigest()[:32]}"
    keys = {
        key: f"list of {len(value)} {hashlib.sha256(repr(value).encode()).hexdigest()[:32]}"
        if isinstance(value, list) and len(value) > 8
        else value
        for key, value in file.fields.items()
    }
    return {"tensors": tensors, "keys": keys}

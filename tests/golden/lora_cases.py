"""The tiny adapters whose conversion is compared with llama.cpp's convert_lora_to_gguf.py."""

from pathlib import Path
from typing import Any

import tiny
import tiny_lora

OUTTYPES = ("f32", "f16", "bf16", "q8_0")

# base: arguments of tiny.checkpoint. lora: arguments of tiny_lora.adapter.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama-all": {"base": {}, "lora": {"targets": tiny_lora.ALL}},
    "llama-no-gqa-rank-32": {"base": {"num_key_value_heads": 4}, "lora": {"targets": tiny_lora.ATTENTION, "rank": 32}},
    "llama-vocabulary": {"base": {}, "lora": {"targets": ("q_proj", "embed_tokens", "lm_head"), "alpha": 4.5}},
    "llama-half": {"base": {"dtype": "BF16"}, "lora": {"targets": ("k_proj", "up_proj"), "dtype": "F16"}},
    "qwen2": {"base": {"family": "qwen2"}, "lora": {"targets": tiny_lora.ALL}},
}


def make(case: str, folder: Path) -> tuple[Path, Path]:
    """(base, adapter), in directories whose names are part of the metadata."""
    base = tiny.checkpoint(folder / "base", **CASES[case]["base"])
    return base, tiny_lora.adapter(folder / case, base, **CASES[case]["lora"])

"""Random LoRA adapters for the checkpoints of tiny.py, as PEFT's save_pretrained writes them: no torch, no peft."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from cnq.archs import of_config

PREFIX = "base_model.model."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def shapes(base: Path) -> dict[str, tuple[int, ...]]:
    config = json.loads((base / "config.json").read_text())
    return of_config(config).expected(config)


def adapter(
    folder: Path,
    base: Path,
    *,
    targets: tuple[str, ...] = ("q_proj", "down_proj"),
    rank: int = 8,
    alpha: float = 16,
    rows: int | None = None,
    dtype: str = "F32",
    size: float = 0.1,
    extra: dict[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter of `base` to `folder`; adapter_config.json's keys can be overridden, None removes one.

    rows: of the whole embed_tokens and lm_head it brings, with a tokenizer of as many tokens. size: of lora_B's numbers.
    extra: tensors beside or instead of these, by their names in the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in shapes(base).items():
        module = name.removesuffix(".weight")
        end = module.rpartition(".")[2]
        if end == "embed_tokens" and end in targets:  # looked up, not multiplied with; PEFT saves it beside its change
            tensors[f"{PREFIX}{module}.base_layer.weight"] = tiny.values(name, shape).astype(np.float16)
            tensors[f"{PREFIX}{module}.lora_embedding_A"] = values(folder.name + name + "A", (rank, shape[0]))
            tensors[f"{PREFIX}{module}.lora_embedding_B"] = size * values(folder.name + name + "B", (shape[1], rank))
        elif end in targets:
            tensors[f"{PREFIX}{module}.lora_A.weight"] = values(folder.name + name + "A", (rank, shape[1]))
            tensors[f"{PREFIX}{module}.lora_B.weight"] = size * values(folder.name + name + "B", (shape[0], rank))
        elif rows and module.endswith(("embed_tokens", "lm_head")):
            tensors[f"{PREFIX}{name}"] = values(folder.name + name, (rows, shape[1]))
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": list(targets),
        "bias": "none", "modules_to_save": ["embed_tokens", "lm_head"] if rows else None, "lora_dropout": 0.05,
        "base_model_name_or_path": base.name,
    }  # fmt: skip
    kept = {key: value for key, value in (settings | config).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    tiny.save(folder / "adapter_model.safetensors", tensors | (extra or {}), dtype)
    if rows:
        tokenizer(folder, rows)
    return folder


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return tiny.values(name, shape).astype(np.float32)


def tokenizer(folder: Path, n: int) -> None:
    """The tokenizer of tiny.py's checkpoints, grown to `n` tokens."""
    known = tiny.tokenizer(folder, "spm")
    (folder / "added_tokens.json").write_text(json.dumps({f"[ADDED{id}]": id for id in range(known, n)}))

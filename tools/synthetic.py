"""A LLaMA-1-7B-shaped checkpoint of random numbers and a Chinese-LLaMA-Plus-like LoRA for it, to measure merging with.

    python tools/synthetic.py /data/synthetic              # base/ 13.5 GB, lora/ 1.1 GB
    python tools/synthetic.py small --layers 1             # base/ 0.9 GB

base/: float16 in shards of 2 GB, 32000 tokens. lora/: rank 64 on all seven matrices of a layer, float32, and whole float16
embed_tokens and lm_head of a vocabulary that has grown to 49953, with its tokenizer. Written a few rows at a time.
"""

import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from cnq import vocab
from cnq.archs.llama import LLAMA
from cnq.checkpoint.hf import write_safetensors
from cnq.gguf_file import CHUNK_ELEMENTS, F16, F32, Planned, TensorType
from cnq.to_hf import write_shards
from cnq.vocab import Kind

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16",
}  # fmt: skip
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS, RANK, ALPHA = 49953, 64, 128.0


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1), default=32, show_default=True)
def main(folder: Path, layers: int) -> None:
    """Write FOLDER/base and FOLDER/lora."""
    config = CONFIG | {"num_hidden_layers": layers}
    shapes = LLAMA.expected(config)
    write_base(folder / "base", config, shapes)
    write_lora(folder / "lora", config, shapes)


def write_base(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, config["vocab_size"])
    write_shards(folder, [random(name, F16, shape) for name, shape in shapes.items()], 2_000_000_000, lambda n: None)


def write_lora(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": MODULES, "bias": "none",
        "modules_to_save": ["embed_tokens", "lm_head"], "base_model_name_or_path": "base", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_tokenizer(folder, ROWS)
    tensors = [
        random(f"base_model.model.{name}.weight", F16, (ROWS, config["hidden_size"]))
        for name in ("model.embed_tokens", "lm_head")
    ]
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in MODULES:
            tensors.append(random(f"base_model.model.{module}.lora_A.weight", F32, (RANK, shape[1])))
            tensors.append(random(f"base_model.model.{module}.lora_B.weight", F32, (shape[0], RANK)))
    write_safetensors(folder / "adapter_model.safetensors", tensors, lambda n: None)


def write_tokenizer(folder: Path, n: int) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256]
    words = n - len(tokens)
    vocab.write(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [*tokens, *(chr(0x4E00 + i % 20000) * (1 + i // 20000) for i in range(words))],
            "tokenizer.ggml.scores": [0.0] * len(tokens) + [float(-i) for i in range(words)],
            "tokenizer.ggml.token_type": [*kinds, *[Kind.NORMAL] * words],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        },
        folder,
    )


def random(name: str, type: TensorType, shape: tuple[int, ...]) -> Planned:
    """Normal numbers of the size that weights have; each tensor has its own seed."""
    return Planned(name, type, shape, partial(_chunks, name, type, shape))


def _chunks(name: str, type: TensorType, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    numbers = np.random.default_rng(zlib.crc32(name.encode()))
    rows = shape[0] if len(shape) > 1 else 1
    step = max(1, CHUNK_ELEMENTS // shape[-1])
    for start in range(0, rows, step):
        chunk = numbers.standard_normal((min(step, rows - start), shape[-1]), np.float32) * np.float32(0.02)
        yield chunk.astype(np.float16 if type == F16 else np.float32)


if __name__ == "__main__":
    main()

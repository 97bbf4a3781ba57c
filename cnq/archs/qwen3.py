"""Qwen 3 (dense): Qwen 2 without biases, with queries and keys normalized head by head."""

from . import qwen2
from .arch import SILU, Arch, Only
from .tensors import To

TENSORS = {name: to for name, to in qwen2.TENSORS.items() if not name.endswith(".bias")} | {
    "model.layers.{}.self_attn.q_norm.weight": To("blk.{}.attn_q_norm.weight", "H"),
    "model.layers.{}.self_attn.k_norm.weight": To("blk.{}.attn_k_norm.weight", "H"),
}

QWEN3 = Arch(
    gguf="qwen3",
    classes=("Qwen3ForCausalLM",),
    model_type="qwen3",
    tensors=TENSORS,
    requires=(SILU, Only("use_sliding_window", (False,)), Only("attention_bias", (False,))),
    defaults=(("num_key_value_heads", 32), ("head_dim", 128), ("max_position_embeddings", 32768)),  # transformers, Qwen3Config
)

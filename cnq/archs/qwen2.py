"""Qwen 1.5, 2 and 2.5 (dense). llama.cpp turns halves here as HF does, so no rows are reordered."""

from dataclasses import replace

from . import llama
from .arch import SILU, Arch, Only
from .tensors import To

TENSORS = {name: replace(to, rope_heads=None) for name, to in llama.TENSORS.items()} | {
    "model.layers.{}.self_attn.q_proj.bias": To("blk.{}.attn_q.bias", "Q"),
    "model.layers.{}.self_attn.k_proj.bias": To("blk.{}.attn_k.bias", "K"),
    "model.layers.{}.self_attn.v_proj.bias": To("blk.{}.attn_v.bias", "K"),
}

QWEN2 = Arch(
    gguf="qwen2",
    classes=("Qwen2ForCausalLM",),
    model_type="qwen2",
    tensors=TENSORS,
    requires=(SILU, Only("use_sliding_window", (False,))),
)

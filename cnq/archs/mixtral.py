"""Mixtral: Mistral with several experts in place of each feed-forward part, the best two by a router's choice.

llama.cpp's `llama` computes it too, from the tensors of a layer's experts stacked into one.
"""

from . import llama, mistral
from .arch import SILU, Arch
from .tensors import To

TENSORS = {name: to for name, to in llama.TENSORS.items() if ".mlp." not in name} | {
    "model.layers.{}.block_sparse_moe.gate.weight": To("blk.{}.ffn_gate_inp.weight", "ED", float32=True),
    "model.layers.{}.block_sparse_moe.experts.{}.w1.weight": To("blk.{}.ffn_gate_exps.weight", "FD"),
    "model.layers.{}.block_sparse_moe.experts.{}.w3.weight": To("blk.{}.ffn_up_exps.weight", "FD"),
    "model.layers.{}.block_sparse_moe.experts.{}.w2.weight": To("blk.{}.ffn_down_exps.weight", "DF"),
}

MIXTRAL = Arch(
    gguf="llama",
    classes=("MixtralForCausalLM",),
    model_type="mixtral",
    tensors=TENSORS,
    requires=(SILU,),
    states=("vocab_size", "rope.dimension_count"),
    defaults=(*mistral.DEFAULTS, ("rope_theta", 1e6), ("num_local_experts", 8), ("num_experts_per_tok", 2)),
    rope_types=llama.ROPE_TYPES,
    windowed=True,
)

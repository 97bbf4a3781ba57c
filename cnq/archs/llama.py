"""LLaMA 1-3, and the models that share its tensors: Chinese-LLaMA/Alpaca 1-3, Vicuna, Yi, DeepSeek-LLM, SmolLM2."""

from .arch import SILU, Arch
from .tensors import To

TENSORS = {
    "model.embed_tokens.weight": To("token_embd.weight", "VD"),
    "model.norm.weight": To("output_norm.weight", "D"),
    "lm_head.weight": To("output.weight", "VD"),
    "model.layers.{}.input_layernorm.weight": To("blk.{}.attn_norm.weight", "D"),
    "model.layers.{}.self_attn.q_proj.weight": To("blk.{}.attn_q.weight", "QD", rope_heads="num_attention_heads"),
    "model.layers.{}.self_attn.k_proj.weight": To("blk.{}.attn_k.weight", "KD", rope_heads="num_key_value_heads"),
    "model.layers.{}.self_attn.v_proj.weight": To("blk.{}.attn_v.weight", "KD"),
    "model.layers.{}.self_attn.o_proj.weight": To("blk.{}.attn_output.weight", "DQ"),
    "model.layers.{}.post_attention_layernorm.weight": To("blk.{}.ffn_norm.weight", "D"),
    "model.layers.{}.mlp.gate_proj.weight": To("blk.{}.ffn_gate.weight", "FD"),
    "model.layers.{}.mlp.up_proj.weight": To("blk.{}.ffn_up.weight", "FD"),
    "model.layers.{}.mlp.down_proj.weight": To("blk.{}.ffn_down.weight", "DF"),
}

BIASES = {
    "model.layers.{}.self_attn.q_proj.bias": To(
        "blk.{}.attn_q.bias", "Q", rope_heads="num_attention_heads", when="attention_bias"
    ),
    "model.layers.{}.self_attn.k_proj.bias": To(
        "blk.{}.attn_k.bias", "K", rope_heads="num_key_value_heads", when="attention_bias"
    ),
    "model.layers.{}.self_attn.v_proj.bias": To("blk.{}.attn_v.bias", "K", when="attention_bias"),
    "model.layers.{}.self_attn.o_proj.bias": To("blk.{}.attn_output.bias", "D", when="attention_bias"),
    "model.layers.{}.mlp.gate_proj.bias": To("blk.{}.ffn_gate.bias", "F", when="mlp_bias"),
    "model.layers.{}.mlp.up_proj.bias": To("blk.{}.ffn_up.bias", "F", when="mlp_bias"),
    "model.layers.{}.mlp.down_proj.bias": To("blk.{}.ffn_down.bias", "D", when="mlp_bias"),
}

# Of llama.cpp's `llama`, which the families of other files share.
STATES = ("attention.key_length", "attention.value_length", "vocab_size", "rope.dimension_count")
ROPE_TYPES = ("default", "dynamic", "linear", "yarn", "llama3")

LLAMA = Arch(
    gguf="llama",
    classes=("LlamaForCausalLM", "LLaMAForCausalLM"),  # the second: checkpoints of 2023's first converters
    model_type="llama",
    tensors=TENSORS | BIASES,
    requires=(SILU,),
    states=STATES,
    rope_types=ROPE_TYPES,
)

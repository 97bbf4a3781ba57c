"""InternLM 2 and 2.5: LLaMA's mathematics under other names, attention's three matrices packed into one.

`wqkv` goes by key-value heads: the rows of the query heads that share one, then that key head's, then that value head's.
Source: modeling_internlm2.py in the models' repositories.
"""

from .arch import SILU, Arch, Only
from .tensors import Packed, Tensors, To

TENSORS: Tensors = {
    "model.tok_embeddings.weight": To("token_embd.weight", "VD"),
    "model.norm.weight": To("output_norm.weight", "D"),
    "output.weight": To("output.weight", "VD"),
    "model.layers.{}.attention_norm.weight": To("blk.{}.attn_norm.weight", "D"),
    "model.layers.{}.attention.wqkv.weight": Packed(
        (
            To("blk.{}.attn_q.weight", "QD", rope_heads="num_attention_heads"),
            To("blk.{}.attn_k.weight", "KD", rope_heads="num_key_value_heads"),
            To("blk.{}.attn_v.weight", "KD"),
        ),
        groups="num_key_value_heads",
    ),
    "model.layers.{}.attention.wo.weight": To("blk.{}.attn_output.weight", "DQ"),
    "model.layers.{}.ffn_norm.weight": To("blk.{}.ffn_norm.weight", "D"),
    "model.layers.{}.feed_forward.w1.weight": To("blk.{}.ffn_gate.weight", "FD"),
    "model.layers.{}.feed_forward.w3.weight": To("blk.{}.ffn_up.weight", "FD"),
    "model.layers.{}.feed_forward.w2.weight": To("blk.{}.ffn_down.weight", "DF"),
}

INTERNLM2 = Arch(
    gguf="internlm2",
    classes=("InternLM2ForCausalLM",),
    model_type="internlm2",
    tensors=TENSORS,
    requires=(SILU, Only("bias", (False,)), Only("tie_word_embeddings", (False,))),
)

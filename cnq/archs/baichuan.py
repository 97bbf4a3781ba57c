"""Baichuan 1 and 2: LLaMA with queries, keys and values packed into one matrix, first all of the one, then of the next.

The 7B models (32 layers) have rotary attention, the 13B models (40) ALiBi; llama.cpp tells them by the number of layers
(src/models/baichuan.cpp) and computes any other number without positions, which is no Baichuan.

Baichuan 2 divides each row of its output head by the row's length when it loads (NormHead in its modeling_baichuan.py). No
llama.cpp graph does that, so the GGUF gets the divided rows, as the authors advise for runtimes made for Baichuan 1.
"""

from . import llama
from .arch import SILU, Arch, Only
from .tensors import Config, Packed, Tensors, To


def norm_head(config: Config) -> bool:
    """Whether it is Baichuan 2: its config class writes z_loss_weight; and no other Baichuan has its vocabulary's size."""
    return "z_loss_weight" in config or config.get("vocab_size") == 125696


_Q, _K, _V = (f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv")

TENSORS: Tensors = {
    **{name: to for name, to in llama.TENSORS.items() if name not in (_Q, _K, _V)},
    "lm_head.weight": To("output.weight", "VD", unit_rows=norm_head),
    "model.layers.{}.self_attn.W_pack.weight": Packed((llama.TENSORS[_Q], llama.TENSORS[_K], llama.TENSORS[_V])),
}

BAICHUAN = Arch(
    gguf="baichuan",
    classes=("BaichuanForCausalLM", "BaiChuanForCausalLM"),  # the second: Baichuan-7B
    model_type="baichuan",
    tensors=TENSORS,
    requires=(
        SILU,
        Only(
            "num_hidden_layers", (32, 40), why="llama.cpp tells rotary attention from ALiBi by the layers, 7B's 32 or 13B's 40"
        ),
        Only("tie_word_embeddings", (False,)),
    ),
    states=("rope.dimension_count",),
    context=("max_position_embeddings", "model_max_length"),
)

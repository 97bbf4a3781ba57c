"""Mistral 7B and its larger dense kin: LLaMA's tensors and llama.cpp's `llama`.

Mistral 7B 0.1 looks back 4096 tokens only; llama.cpp's `llama` has no such window, so longer texts come out otherwise.
"""

from . import llama
from .arch import SILU, Arch

# Source: transformers, MistralConfig.
DEFAULTS = (("num_key_value_heads", 8), ("max_position_embeddings", 131072))

MISTRAL = Arch(
    gguf="llama",
    classes=("MistralForCausalLM",),
    model_type="mistral",
    tensors=llama.TENSORS,
    requires=(SILU,),
    states=llama.STATES,
    defaults=(*DEFAULTS, ("sliding_window", 4096)),
    rope_types=llama.ROPE_TYPES,
    windowed=True,
)

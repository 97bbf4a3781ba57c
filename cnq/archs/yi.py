"""Yi as first published: LLaMA with the two norms of a layer under other names. Later releases are LlamaForCausalLM."""

from . import llama
from .arch import SILU, Arch

TENSORS = {
    name.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2"): to for name, to in llama.TENSORS.items()
}

YI = Arch(
    gguf="llama",
    classes=("YiForCausalLM",),
    model_type="Yi",
    tensors=TENSORS,
    requires=(SILU,),
    states=llama.STATES,
)

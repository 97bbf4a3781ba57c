"""A converted checkpoint computes in llama.cpp what it computes in transformers."""

import numpy as np
import pytest

from cnq.engine.model import Model

ROPE_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
VARIANTS = {
    "llama": {},
    "no-gqa": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "head-dim": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope-theta": {"rope_theta": 500000.0},
    "rope-llama3": {"rope_theta": 500000.0, "rope_scaling": ROPE_LLAMA3},
    "rope-linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope-yarn": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "max_position_embeddings": 256,
    },
    "rope-dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},  # has to do nothing up to 512 tokens
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "qwen3-tied": {"family": "qwen3", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "mistral": {"family": "mistral"},
    "mistral-window": {"family": "mistral", "sliding_window": 150},  # as long as the text: nothing falls out of it
    "mistral-head-dim": {"family": "mistral", "head_dim": 32},
    "mixtral": {"family": "mixtral"},
    "mixtral-3-of-8": {"family": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, gguf):
    """float32 weights, 150 tokens, so that scaled rotary positions matter: max |Δ| < 1e-3."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = gguf(dtype="f32", **VARIANTS[variant])
    tokens = np.random.default_rng(0).integers(3, 400, 150).tolist()
    reference = transformers.AutoModelForCausalLM.from_pretrained(path.parent / "hf", dtype=torch.float32)
    with torch.no_grad():
        want = reference(torch.tensor([tokens])).logits[0].numpy()
    with Model(path, n_ctx=256, exact=True) as model:
        got = model.logits(tokens)
    assert np.abs(want).max() > 0.5  # the model says something
    assert np.abs(got - want).max() < 1e-3

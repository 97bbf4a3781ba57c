"""Families whose code transformers does not carry: llama.cpp's logits against the formulas of the models' own code.

modeling_internlm2.py and modeling_baichuan.py (7B and 13B) of the models' repositories, in numpy and float64, on the
checkpoint's tensors as they are named there: nothing of cnq.archs takes part.
"""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from cnq.engine.model import Model

N = 150  # tokens, so that positions matter


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def rotated(x, theta):
    """x: (n, heads, d). The halves of a head turn against each other, with the position."""
    n, _, d = x.shape
    angles = np.arange(n)[:, None] * theta ** (-np.arange(0, d, 2) / d)  # (n, d/2)
    cos, sin = (np.concatenate([f(angles)] * 2, axis=1)[:, None] for f in (np.cos, np.sin))
    turned = np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], axis=-1)
    return x * cos + turned * sin


def alibi_slopes(heads):
    """As Baichuan-13B has them: a geometric sequence, and for heads beyond a power of two every other one of the next."""

    def geometric(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start ** (i + 1) for i in range(n)]

    if math.log2(heads).is_integer():
        return geometric(heads)
    below = 2 ** math.floor(math.log2(heads))
    return geometric(below) + geometric(2 * below)[0::2][: heads - below]


def attended(q, k, v, slopes=None):
    """q: (n, heads, d), k and v: (n, kv heads, d) -> (n, heads x d). Causal, with ALiBi where slopes are given."""
    n, heads, d = q.shape
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("nhd,mhd->hnm", q, k) / math.sqrt(d)
    if slopes is not None:
        distance = np.arange(n)[:, None] - np.arange(n)[None]
        scores -= np.array(slopes)[:, None, None] * distance
    scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    return np.einsum("hnm,mhd->nhd", softmax(scores), v).reshape(n, -1)


def internlm2(tokens, w, c):
    n, heads, kv = len(tokens), c["num_attention_heads"], c["num_key_value_heads"]
    d, eps = c["hidden_size"] // heads, c["rms_norm_eps"]
    x = w["model.tok_embeddings.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        qkv = rms_norm(x, w[p + "attention_norm.weight"], eps) @ w[p + "attention.wqkv.weight"].T
        qkv = qkv.reshape(n, kv, heads // kv + 2, d)
        q = rotated(qkv[:, :, :-2].reshape(n, heads, d), c["rope_theta"])
        k = rotated(qkv[:, :, -2], c["rope_theta"])
        x = x + attended(q, k, qkv[:, :, -1]) @ w[p + "attention.wo.weight"].T
        h = rms_norm(x, w[p + "ffn_norm.weight"], eps)
        gate, up = (h @ w[p + f"feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (silu(gate) * up) @ w[p + "feed_forward.w2.weight"].T
    return rms_norm(x, w["model.norm.weight"], eps) @ w["output.weight"].T


def baichuan(tokens, w, c, *, alibi, norm_head):
    n, heads, eps = len(tokens), c["num_attention_heads"], c["rms_norm_eps"]
    d = c["hidden_size"] // heads
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        packed = rms_norm(x, w[p + "input_layernorm.weight"], eps) @ w[p + "self_attn.W_pack.weight"].T
        q, k, v = np.moveaxis(packed.reshape(n, 3, heads, d), 1, 0)
        if not alibi:
            q, k = rotated(q, 10000.0), rotated(k, 10000.0)
        x = x + attended(q, k, v, alibi_slopes(heads) if alibi else None) @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
        gate, up = (h @ w[p + f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if norm_head:
        head = head / np.linalg.norm(head, axis=1, keepdims=True)
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


VARIANTS = {
    "internlm2": ({"family": "internlm2"}, internlm2, {}),
    "internlm2, one key head": ({"family": "internlm2", "num_key_value_heads": 1}, internlm2, {}),
    "internlm2, no groups": ({"family": "internlm2", "num_key_value_heads": 4}, internlm2, {}),
    "baichuan-7b": ({"family": "baichuan-7b"}, baichuan, {"alibi": False, "norm_head": False}),
    "baichuan-13b": ({"family": "baichuan-13b"}, baichuan, {"alibi": True, "norm_head": False}),
    "baichuan-13b, 6 heads": (
        {"family": "baichuan-13b", "num_attention_heads": 6, "hidden_size": 96},
        baichuan,
        {"alibi": True, "norm_head": False},
    ),
    "baichuan2-7b": ({"family": "baichuan2-7b"}, baichuan, {"alibi": False, "norm_head": True}),
    "baichuan2-13b": (
        {"family": "baichuan-13b", "z_loss_weight": 0},
        baichuan,
        {"alibi": True, "norm_head": True},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_published_formulas(variant, gguf):
    """float32 weights in llama.cpp: max |Δ| < 1e-4."""
    settings, formula, how = VARIANTS[variant]
    path = gguf(dtype="f32", **settings)
    folder = path.parent / "hf"
    weights = {name: w.astype(np.float64) for name, w in load_file(folder / "model.safetensors").items()}
    tokens = np.random.default_rng(0).integers(3, 400, N).tolist()
    want = formula(tokens, weights, json.loads((folder / "config.json").read_text()), **how)
    with Model(path, n_ctx=256, exact=True) as model:
        got = model.logits(tokens)
    assert np.abs(want).max() > 0.5  # the model says something
    assert np.abs(got - want).max() < 1e-4

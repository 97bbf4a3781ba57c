"""A tiny Hugging Face checkpoint in Meta's layout, by torch alone: slices and permutations written out, none of cnq's code."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from gguf.vocab import bytes_to_unicode

torch = pytest.importorskip("torch")

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "ffn_dim_multiplier": 0.5,
          "norm_eps": 1e-5, "vocab_size": -1}  # fmt: skip


def checkpoint(hf: Path, folder: Path, *, shards: int = 1, embedding_dim: int = 1, nested: bool = False, **params: Any) -> Path:
    """Write the llama checkpoint `hf` to `folder` as `shards` ranks; params.json's keys can be overridden, None removes one.

    embedding_dim: that by which the ranks share tok_embeddings: 1 before LLaMA 3, then 0.
    """
    from safetensors.torch import load_file

    config = json.loads((hf / "config.json").read_text())
    state = {name: tensor for file in hf.glob("*.safetensors") for name, tensor in load_file(file).items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    whole = {"tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    if "lm_head.weight" in state:
        whole["output.weight"] = state["lm_head.weight"]
    for i in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        whole[new + "attention.wq.weight"] = adjacent(state[old + "self_attn.q_proj.weight"], heads)
        whole[new + "attention.wk.weight"] = adjacent(state[old + "self_attn.k_proj.weight"], kv_heads)
        whole[new + "attention.wv.weight"] = state[old + "self_attn.v_proj.weight"]
        whole[new + "attention.wo.weight"] = state[old + "self_attn.o_proj.weight"]
        whole[new + "feed_forward.w1.weight"] = state[old + "mlp.gate_proj.weight"]
        whole[new + "feed_forward.w2.weight"] = state[old + "mlp.down_proj.weight"]
        whole[new + "feed_forward.w3.weight"] = state[old + "mlp.up_proj.weight"]
        whole[new + "attention_norm.weight"] = state[old + "input_layernorm.weight"]
        whole[new + "ffn_norm.weight"] = state[old + "post_attention_layernorm.weight"]
    folder.mkdir(parents=True)
    for rank in range(shards):
        part = {name: piece(name, tensor, rank, shards, embedding_dim) for name, tensor in whole.items()}
        freqs = torch.arange(config["hidden_size"] // heads // 2, dtype=torch.float16)
        part["rope.freqs"] = part["layers.0.attention.inner_attention.rope.freqs"] = freqs  # as LLaMA 1 has them
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    content = PARAMS | {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": heads, "n_kv_heads": kv_heads,
        "norm_eps": config["rms_norm_eps"],
    } | params  # fmt: skip
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "params.json").write_text(json.dumps({"model": content} if nested else content))
    for file in hf.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, folder)
    return folder


def adjacent(w: Any, heads: int) -> Any:
    """Halves of a head, which HF turns against each other -> adjacent pairs."""
    return w.view(heads, 2, w.shape[0] // heads // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def piece(name: str, w: Any, rank: int, shards: int, embedding_dim: int) -> Any:
    """What a rank has of a tensor; rows of output that cannot be shared out evenly go to the last."""
    if w.dim() == 1:
        return w.clone()
    dim = embedding_dim if name.startswith("tok_") else 1 if name.endswith(("wo.weight", "w2.weight")) else 0
    size = w.shape[dim] // shards
    end = w.shape[dim] if rank == shards - 1 else (rank + 1) * size
    return w.narrow(dim, rank * size, end - rank * size).clone()


N_RANKS, N_LLAMA3 = 400, 656  # tokens of `ranks`; with the 256 special ones


def ranks(path: Path) -> Path:
    """Write a small tokenizer.model of LLaMA 3's kind: a byte-level BPE trained on a few sentences, its merges left out."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = tiny.pre_tokenizer("llama-bpe")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=N_RANKS, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(tiny.SENTENCES * 3, trainer)
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [base64.b64encode(bytes(byte_of[c] for c in token)) + b" %d\n" % id for token, id in tokens]
    assert len(lines) == N_RANKS
    path.write_bytes(b"".join(lines))
    return path


def llama3(folder: Path, **config: Any) -> Path:
    """A tiny LLaMA 3 of Hugging Face's form, its tokenizer in Meta's: folder/hf."""
    hf = tiny.checkpoint(folder / "hf", vocab_size=N_LLAMA3, **({"rope_theta": 500000.0, "dtype": "BF16"} | config))
    (hf / "tokenizer_config.json").unlink()
    ranks(hf / "tokenizer.model")
    return hf

"""Adapters as GGUF: the bytes of llama.cpp's own converter, and in llama.cpp the logits of the merged model."""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest
import tiny_lora
from click.testing import CliRunner
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
sys.path.append(str(GOLDEN))

import cases  # noqa: E402
import lora_cases  # noqa: E402
from tiny_lora import PREFIX  # noqa: E402

from cnq.cli import cli  # noqa: E402
from cnq.convert import convert  # noqa: E402
from cnq.convert_lora import convert_lora  # noqa: E402
from cnq.engine.model import Model  # noqa: E402
from cnq.errors import CheckpointError  # noqa: E402
from cnq.gguf_file import GgufFile  # noqa: E402


@pytest.mark.parametrize("case", lora_cases.CASES)
def test_every_tensor_and_key_equals_llama_cpps(case, tmp_path):
    """Same names, types, shapes and bytes, in the same order, for each --dtype."""
    golden = json.loads((GOLDEN / "lora.json").read_text())["cases"][case]
    base, adapter = lora_cases.make(case, tmp_path)
    for outtype in lora_cases.OUTTYPES:
        converted = convert_lora(adapter, tmp_path / f"{outtype}.gguf", base=base, dtype=outtype)
        found = cases.fingerprint(converted.path)
        assert list(found["tensors"].items()) == list(golden[outtype]["tensors"].items()), outtype
        assert found["keys"] == golden[outtype]["keys"]


VARIANTS = {
    "plain": ({}, {"targets": tiny_lora.ALL}),
    "vocabulary": ({}, {"targets": ("q_proj", "embed_tokens", "lm_head")}),
    "rslora": ({}, {"targets": tiny_lora.ALL, "use_rslora": True, "rank": 16}),
    "patterns": ({}, {"targets": tiny_lora.ALL, "alpha_pattern": {"q_proj": 64, r"layers\.1\.mlp\..*": 2}, "use_rslora": True}),
    "qwen2": ({"family": "qwen2"}, {"targets": tiny_lora.ATTENTION}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_with_it_what_the_merged_model_does(variant, gguf, tmp_path):
    """float32 throughout, 60 tokens: max |Δ| < 1e-3."""
    model, settings = VARIANTS[variant]
    path = gguf(dtype="f32", **model)
    adapter = tiny_lora.adapter(tmp_path / "my-lora", path.parent / "hf", **settings)
    merged = convert(path, tmp_path / "merged.gguf", loras=[adapter], dtype="f32").path
    lora = convert_lora(adapter, tmp_path / "lora.gguf", base=path.parent / "hf").path
    tokens = np.random.default_rng(0).integers(3, 400, 60).tolist()
    plain, want, got = logits(path, tokens), logits(merged, tokens), logits(path, tokens, lora)
    assert np.abs(want - plain).max() > 0.1  # the adapter says something
    assert np.abs(want - got).max() < 1e-3


def logits(path: Path, tokens: list[int], lora: Path | None = None) -> np.ndarray:
    with Model(path, n_ctx=64, exact=True) as model:
        if lora:
            adapter = lib.llama_adapter_lora_init(model._model, str(lora).encode())
            assert adapter
            adapters, scales = (lib.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
            assert lib.llama_set_adapters_lora(model._ctx, adapters, 1, scales) == 0
        return model.logits(tokens)


ONES = np.ones(64, np.float32)
LAYER0, LAYER1 = (f"{PREFIX}model.layers.{i}.self_attn.q_proj" for i in range(2))
LENGTHS = {f"{layer}.lora_magnitude_vector": ONES for layer in (LAYER0, LAYER1)}
ROWS = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": np.stack([ONES, ONES])}
REFUSED = {
    "whole modules": (
        {},
        {"rows": 421},
        r"holds whole tensors .*Merge it instead: python -m training.merge_lora .*cnq convert",
    ),
    "whole modules of the same size": ({}, {"rows": 420}, r"holds whole tensors \(lm_head.weight, model.embed_tokens.weight\)"),
    "DoRA": ({}, {"use_dora": True, "targets": ("q_proj",), "extra": LENGTHS}, "is DoRA, whose lengths llama.cpp has no"),
    "rows": ({}, {"trainable_token_indices": [1, 2], "extra": ROWS}, "holds rows of model.embed_tokens.weight"),
    "biases": (
        {"family": "qwen2"},
        {"extra": {f"{LAYER0}.lora_B.bias": ONES}},
        r"has biases \(model.layers.0.self_attn.q_proj\)",
    ),
    "shared rows": ({"tie_word_embeddings": True}, {"targets": ("embed_tokens",)}, "changes model.embed_tokens.weight, which"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_lora_in_gguf_cannot_hold_is_refused(case, gguf, tmp_path):
    model, settings, saying = REFUSED[case]
    base = gguf(**model).parent / "hf"
    adapter = tiny_lora.adapter(tmp_path / "my-lora", base, **settings)
    with pytest.raises(CheckpointError, match=saying):
        convert_lora(adapter, tmp_path / "lora.gguf", base=base)
    assert not list(tmp_path.glob("lora.gguf*"))


def test_an_embedding_saved_beside_its_change_has_to_be_the_bases(gguf, tmp_path):
    base = gguf().parent / "hf"
    adapter = tiny_lora.adapter(tmp_path / "my-lora", base, targets=("embed_tokens",))
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"{PREFIX}model.embed_tokens.base_layer.weight"][3, 3] += 1
    tiny_lora.tiny.save(adapter / "adapter_model.safetensors", tensors, "F32")
    with pytest.raises(CheckpointError, match=r"holds whole tensors \(model.embed_tokens.weight\)"):
        convert_lora(adapter, tmp_path / "lora.gguf", base=base)


def test_an_adapter_of_another_base_is_refused(gguf, tmp_path):
    adapter = tiny_lora.adapter(tmp_path / "my-lora", gguf().parent / "hf")
    with pytest.raises(CheckpointError, match="another base"):
        convert_lora(adapter, tmp_path / "lora.gguf", base=gguf(hidden_size=256, intermediate_size=512).parent / "hf")


def test_the_command(gguf, tmp_path):
    base = gguf().parent / "hf"
    adapter = tiny_lora.adapter(tmp_path / "my-lora", base)
    command = ["convert-lora", str(adapter), str(tmp_path / "lora.gguf"), "--base", str(base)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert "llama, f32, 4 matrices, alpha 16" in result.stdout
    assert GgufFile(tmp_path / "lora.gguf").fields["general.type"] == "adapter"
    again = CliRunner().invoke(cli, command)
    assert (again.exit_code, "--force" in again.stderr) == (1, True)
    assert json.loads(CliRunner().invoke(cli, [*command, "--force", "--json"]).stdout)["n_modules"] == 4

"""Adapters of families whose tensors are packed, stacked or normalised on the way to a GGUF."""

import numpy as np
import pytest
import tiny
import tiny_lora
from test_convert_lora import logits

from cnq.adapters import merge, read_adapter
from cnq.checkpoint import open_checkpoint
from cnq.convert import convert
from cnq.convert_lora import convert_lora
from cnq.errors import CheckpointError
from cnq.gguf_file import GgufFile
from cnq.to_hf import write_hf

# family -> modules that an adapter changes
FAMILIES = {
    "mistral": ("q_proj", "v_proj"),
    "qwen3": ("k_proj", "down_proj"),
    "internlm2": ("wqkv", "w1"),  # one matrix for q, k and v, group by group
    "baichuan-7b": ("W_pack", "o_proj"),
    "baichuan2-7b": ("W_pack", "gate_proj"),
}


def made(family, folder, targets):
    base = tiny.checkpoint(folder / "base", family, dtype="F32", vocab="qwen2" if family == "qwen3" else "spm")
    return base, tiny_lora.adapter(folder / "my-lora", base, targets=targets)


def tensors(path) -> dict[str, bytes]:
    file = GgufFile(path)
    return {name: file.tensor(name).data.tobytes() for name in file.tensors}


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_converting_with_adapters_gives_the_bytes_of_the_merged_checkpoint(family, tmp_path):
    base, lora = made(family, tmp_path, FAMILIES.get(family, ("q_proj", "w2")))
    folder = write_hf(merge(open_checkpoint(base), [read_adapter(lora)]).checkpoint, tmp_path / "merged").path
    straight = tensors(convert(base, tmp_path / "straight.gguf", loras=[lora]).path)
    assert straight == tensors(convert(folder, tmp_path / "by-way.gguf").path)
    assert straight != tensors(convert(base, tmp_path / "base.gguf").path)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_with_it_what_the_merged_model_does(family, tmp_path):
    base, lora = made(family, tmp_path, FAMILIES[family])
    plain = convert(base, tmp_path / "base.gguf", dtype="f32").path
    merged = convert(base, tmp_path / "merged.gguf", loras=[lora], dtype="f32").path
    adapter = convert_lora(lora, tmp_path / "lora.gguf", base=base).path
    tokens = np.random.default_rng(0).integers(3, 400, 40).tolist()
    want = logits(merged, tokens)
    assert np.abs(want - logits(plain, tokens)).max() > 0.05  # the adapter says something
    assert np.abs(want - logits(plain, tokens, adapter)).max() < 1e-3


@pytest.mark.parametrize(("family", "target"), [("mixtral", "w2"), ("baichuan2-7b", "lm_head")])
def test_what_the_gguf_has_in_another_form_is_refused(family, target, tmp_path):
    """Experts are stacked, a normalised head is divided by its lengths: no low-rank change of what is in the GGUF."""
    base, lora = made(family, tmp_path, (target,))
    with pytest.raises(
        CheckpointError, match=f"changes .*{target}.*which the GGUF does not have as they are.*Merge it instead"
    ):
        convert_lora(lora, tmp_path / "lora.gguf", base=base)

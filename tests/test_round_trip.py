"""HF → GGUF → HF: the same bytes, and a tokenizer that cuts alike."""

import json

import numpy as np
import pytest
import tiny
from cases import CASES
from safetensors import safe_open
from test_quantize import write_imatrix

from cnq import vocab
from cnq.checkpoint import open_checkpoint
from cnq.convert import convert
from cnq.engine.worker import ftypes
from cnq.errors import GgufError, UnsupportedVocab
from cnq.gguf_file import GgufFile
from cnq.quantize import quantize
from cnq.to_hf import to_hf


def raw(folder):
    """Tensor name -> (dtype, bytes) of a checkpoint's safetensors files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as f:
            dtypes = {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118
        checkpoint = open_checkpoint(folder)
        found |= {name: (dtype, checkpoint.read(name).data.tobytes()) for name, dtype in dtypes.items()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_comes_back_bit_identical(case, tmp_path):
    pytest.importorskip("tokenizers")
    settings = {"dtype": "F16"} | CASES[case]
    source = tiny.checkpoint(tmp_path / "hf", **settings)
    there = convert(source, tmp_path / "there.gguf", dtype=settings["dtype"].lower())
    back = to_hf(there.path, tmp_path / "back")
    assert different(raw(back.path), raw(source)) == CHANGED.get(case, set())
    again = convert(back.path, tmp_path / "again.gguf", dtype=settings["dtype"].lower(), name=there.path.parent.name)
    one, two = GgufFile(there.path), GgufFile(again.path)
    assert one.tensors.keys() == two.tensors.keys()
    assert all(one.tensor(t).data.tobytes() == two.tensor(t).data.tobytes() for t in one.tensors)
    # size_label and name come from the model card and the folder, the rest from the model
    restated = {k for k in different(one.fields, two.fields) if not k.startswith("general.")}
    assert not {k.partition(".")[2] for k in restated} - RESTATED


def different(one, two):
    return {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}


# Baichuan 2's output head comes back as it is used, with rows of length 1; dividing them again changes no bit.
CHANGED = {"baichuan2-7b": {"lm_head.weight"}}
# Said outright on the way back, where the first checkpoint left it to a default.
RESTATED = {"ggml.add_bos_token", "ggml.add_eos_token", "attention.key_length", "attention.value_length"}


@pytest.mark.parametrize("vocab", ["spm", "spm-added", "tekken", "llama-bpe", "qwen2", "smollm", "gpt-2", "deepseek-v3"])
def test_the_restored_tokenizer_cuts_alike(vocab, gguf, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = gguf(vocab=vocab)
    folder = to_hf(path, tmp_path / "back").path
    old = transformers.AutoTokenizer.from_pretrained(path.parent / "hf")
    new = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*tiny.SENTENCES, "1234567890 <|im_start|>量化 模型", "  两个 空格  "]:
        assert new.encode(text) == old.encode(text), text
    assert (new.bos_token, new.eos_token) == (old.bos_token, old.eos_token)


def test_every_type_that_gguf_decodes_comes_back(wide_gguf, gguf, tmp_path):
    """Quantize to each type, restore, and find the values that ggml's own decoder gives."""
    from gguf.quants import _type_traits  # the package's list of decoders

    decodable = {t.name for t in _type_traits} | {"F16", "F32"}
    imatrix = write_imatrix(wide_gguf, tmp_path / "im.gguf")
    ends = {"embedding_type": "Q8_0", "output_type": "Q8_0"}
    for type in ftypes():
        q = quantize(wide_gguf, tmp_path / f"{type}.gguf", type, imatrix=imatrix, pure=True, **ends).path
        file = GgufFile(q)
        if not {t.type.name for t in file.tensors.values()} <= decodable:
            with pytest.raises(GgufError, match="cannot be decoded"):
                to_hf(q, tmp_path / type)
            continue
        restored = open_checkpoint(to_hf(q, tmp_path / type, dtype="f32").path)
        want = file.tensor("blk.0.ffn_down.weight").float32()
        assert np.array_equal(restored.read("model.layers.0.mlp.down_proj.weight").float32(), want), type


def test_shards_and_index_are_those_transformers_reads(gguf, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = to_hf(gguf(), tmp_path / "back", max_shard_bytes=100_000).path
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, data in raw(folder).values())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2


def test_a_hugging_face_directory_is_copied_in_other_shards(tmp_path):
    """Bits, types and the files that transformers reads; nothing else of the folder."""
    source = tiny.checkpoint(tmp_path / "hf", vocab="spm-added", dtype="BF16", auto_map={"AutoTokenizer": ["own.Own", None]})
    tiny.save(source / "model-norm.safetensors", {"model.norm.weight": tiny.values("model.norm.weight", (64,))}, "F32")
    shapes = {
        name: entry.shape
        for name, entry in open_checkpoint(tiny.checkpoint(tmp_path / "same", vocab="spm-added")).entries.items()
    }
    rest = {name: tiny.values(name, shape) for name, shape in shapes.items() if name != "model.norm.weight"}
    tiny.save(source / "model.safetensors", rest, "BF16")
    for name in ("generation_config.json", "tokenization_own.py", "added_tokens.json"):
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (source / "train.log").write_text("secret")
    back = to_hf(source, tmp_path / "back", max_shard_bytes=100_000).path
    assert raw(back) == raw(source)
    assert raw(back)["model.norm.weight"][0] == "F32"
    names = {"generation_config.json", "tokenization_own.py", "added_tokens.json", "tokenizer.model", "tokenizer_config.json"}
    assert {p.name for p in back.iterdir()} == names | {"additional_chat_templates"} | {
        "config.json",
        "model.safetensors.index.json",
    } | {p.name for p in back.glob("model-*.safetensors")}


def test_a_hugging_face_directory_in_another_type(tmp_path):
    source = tiny.checkpoint(tmp_path / "hf", dtype="F32")
    half = to_hf(source, tmp_path / "half", dtype="bf16")
    types = {name: dtype for name, (dtype, _) in raw(half.path).items()}
    assert (half.dtype, half.decoded) == ("BF16", 0)
    assert {types[name] for name in types if "proj" in name or "embed" in name} == {"BF16"}
    assert types["model.norm.weight"] == "F32"  # would lose bits
    assert json.loads((half.path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_unknown_pre_tokenizer_is_not_guessed(gguf, tmp_path):
    fields = dict(GgufFile(gguf(vocab="qwen2")).fields) | {"tokenizer.ggml.pre": "viking"}
    with pytest.raises(UnsupportedVocab, match="viking"):
        vocab.write(fields, tmp_path)

"""What is particular to a family: experts, packed rows, divided rows, windows, other names."""

import json
import tracemalloc

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as spm_pb2

from cnq import convert as converting
from cnq.checkpoint import open_checkpoint
from cnq.convert import convert
from cnq.corpus import Source, chunks
from cnq.engine.model import Model
from cnq.errors import VocabMismatch
from cnq.gguf_file import F32, GgufFile
from cnq.imatrix import collect
from cnq.quantize import quantize
from cnq.to_hf import to_hf

EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"


# Mixtral


def test_experts_are_stacked_in_their_order(tmp_path):
    """Eleven of them, so that numbers and names sort differently, and the files hold them in the order of the names."""
    source = tiny.checkpoint(tmp_path / "hf", "mixtral", num_local_experts=11, dtype="F32")
    tensors = load_file(source / "model.safetensors")
    save_file(dict(sorted(tensors.items())), source / "model.safetensors")
    stacked = GgufFile(convert(source, tmp_path / "m.gguf", dtype="f32").path).tensor("blk.1.ffn_down_exps.weight").data
    assert stacked.shape == (11, 64, 96)
    for i in range(11):
        assert np.array_equal(stacked[i], tensors[EXPERT.format(1, i, "w2")])


def test_one_expert_is_in_memory_at_a_time(tmp_path):
    source = tiny.checkpoint(tmp_path / "hf", "mixtral", num_local_experts=16, hidden_size=256, intermediate_size=512)
    (planned,) = (
        t for t in converting._plan(open_checkpoint(source), F32) if t.name == "blk.0.ffn_up_exps.weight"
    )  # fmt: skip
    assert planned.nbytes == 16 * 512 * 256 * 4
    tracemalloc.start()
    try:
        assert sum(chunk.nbytes for chunk in planned.chunks()) == planned.nbytes
        assert tracemalloc.get_traced_memory()[1] < planned.nbytes / 4
    finally:
        tracemalloc.stop()


def test_a_mixtral_is_calibrated_and_quantized(gguf, tmp_path):
    """As any model: llama.cpp's mixture, an importance matrix that counts each expert's tokens, and a model that runs."""
    f16 = gguf(family="mixtral", hidden_size=256, intermediate_size=512)
    ids = np.random.default_rng(0).integers(3, 400, (3, 64))
    made = chunks([Source("ids", "0" * 64, ("x",))], lambda t: ids.ravel().tolist(), 64, None)
    collect(f16, lambda model: made, tmp_path / "im.gguf", n_ctx=64)
    for name, imatrix in (("Q4_K_M", None), ("IQ2_XXS", tmp_path / "im.gguf")):
        path = quantize(f16, tmp_path / f"{name}.gguf", name, imatrix=imatrix).path
        file = GgufFile(path)
        assert file.tensors["blk.0.ffn_gate_inp.weight"].type == F32
        assert file.tensors["blk.0.ffn_gate_exps.weight"].type.name == {"Q4_K_M": "Q4_K", "IQ2_XXS": "IQ2_XXS"}[name]
        with Model(path, n_ctx=64) as model:
            assert np.isfinite(model.logits(ids[0].tolist())).all()
    back = to_hf(tmp_path / "Q4_K_M.gguf", tmp_path / "back", dtype="f32")
    found = open_checkpoint(back.path).read(EXPERT.format(1, 2, "w1")).float32()
    assert np.array_equal(found, GgufFile(tmp_path / "Q4_K_M.gguf").tensor("blk.1.ffn_gate_exps.weight").float32()[2])
    assert json.loads((back.path / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]


def test_a_single_expert(tmp_path):
    """ggml drops the dimension of 1 when it quantizes."""
    source = tiny.checkpoint(tmp_path / "hf", "mixtral", num_local_experts=1, num_experts_per_tok=1, dtype="F32")
    f32 = convert(source, tmp_path / "f32.gguf", dtype="f32").path
    q8 = quantize(f32, tmp_path / "q8.gguf", "Q8_0").path
    assert len(GgufFile(q8).tensors["blk.0.ffn_up_exps.weight"].shape) == 2
    want = open_checkpoint(source).read(EXPERT.format(0, 0, "w3")).float32()
    assert abs(open_checkpoint(q8).read(EXPERT.format(0, 0, "w3")).float32() - want).max() < 0.01


def test_transformers_own_mixtral(tmp_path):
    """A checkpoint as save_pretrained writes it, and to-hf's as from_pretrained reads it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = tiny.checkpoint(tmp_path / "hf", "mixtral", dtype="F32")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(source)
    back = to_hf(convert(source, tmp_path / "m.gguf", dtype="f32").path, tmp_path / "back").path
    again = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    want, got = model.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


# Packed queries, keys and values


@pytest.mark.parametrize("family", ["internlm2", "baichuan-7b"])
def test_parts_of_several_types_come_back_in_one(family, gguf, tmp_path):
    """As in Q4_K_M, where v is of another type than q: decoded, and counted as such."""
    f32 = gguf(family=family, dtype="f32", hidden_size=256, intermediate_size=512)
    quantized = quantize(f32, tmp_path / "q.gguf", "Q8_0", tensor_types=[("attn_v", "Q6_K"), ("attn_k", "F16")]).path
    packed = {"internlm2": "attention.wqkv", "baichuan-7b": "self_attn.W_pack"}[family]
    name = f"model.layers.1.{packed}.weight"
    checkpoint, original = open_checkpoint(quantized), open_checkpoint(f32)
    assert (checkpoint.entries[name].type, checkpoint.entries[name].decoded) == (F32, True)
    want, got = original.read(name).float32(), checkpoint.read(name).float32()
    assert want.shape == got.shape == checkpoint.entries[name].shape
    assert 0 < abs(got - want).max() < 0.05
    back = to_hf(quantized, tmp_path / "back", dtype="f32")
    assert back.decoded == sum(e.decoded for e in checkpoint.entries.values()) == back.n_tensors - 2 * n_layers(f32) - 1
    assert np.array_equal(open_checkpoint(back.path).read(name).float32(), got)


def n_layers(path):
    file = GgufFile(path)
    return file.fields[f"{file.arch}.block_count"]


# Baichuan 2


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_the_head_of_baichuan_2_gets_rows_of_length_1(dtype, tmp_path):
    """As torch divides them in float32, rounded once; and a row of zeros stays one."""
    torch = pytest.importorskip("torch")
    source = tiny.checkpoint(tmp_path / "hf", "baichuan2-7b", dtype="F32")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] *= np.geomspace(1e-3, 1e3, len(tensors["lm_head.weight"]), dtype=np.float32)[:, None]
    tensors["lm_head.weight"][7] = 0
    tiny.save(source / "model.safetensors", tensors, dtype)
    head = torch.from_numpy(open_checkpoint(source).read("lm_head.weight").float32())
    want = torch.nn.functional.normalize(head).numpy()
    found = GgufFile(convert(source, tmp_path / "m.gguf", dtype=dtype.lower()).path).tensor("output.weight").float32()
    assert abs(found - want).max() < {"F32": 1e-6, "F16": 2**-12, "BF16": 2**-9}[dtype]  # half a unit in the last place
    assert not found[7].any()
    assert any("lm_head.weight: each row is divided by its length" in note for note in notes(source, tmp_path))
    # a checkpoint whose head was divided beforehand, as the authors advise, gives the same
    tensors["lm_head.weight"] = found
    tiny.save(source / "model.safetensors", tensors, dtype)
    again = GgufFile(convert(source, tmp_path / "again.gguf", dtype=dtype.lower()).path).tensor("output.weight").float32()
    assert abs(again - found).max() <= (1e-6 if dtype == "F32" else 0)


def test_baichuan_2_is_known_by_its_config_or_its_vocabulary():
    for more, divided in (({}, False), ({"z_loss_weight": 0}, True), ({"vocab_size": 125696}, True)):
        config = {
            "architectures": ["BaichuanForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 40,
            "num_attention_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 64000, **more,
        }  # fmt: skip
        heads = [link for link in tiny.of_config(config).links(config) if link.unit_rows]
        assert [link.hf for link in heads] == ["lm_head.weight"] * divided


# Mistral


def test_beyond_its_window_a_mistral_sees_more_in_llama_cpp(gguf, tmp_path):
    """The logits are transformers' up to the window, others behind it, and converting says so."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = gguf(dtype="f32", family="mistral", sliding_window=40)
    tokens = np.random.default_rng(0).integers(3, 400, 150).tolist()
    reference = transformers.AutoModelForCausalLM.from_pretrained(path.parent / "hf", dtype=torch.float32)
    with torch.no_grad():
        want = reference(torch.tensor([tokens])).logits[0].numpy()
    with Model(path, n_ctx=256, exact=True) as model:
        off = np.abs(model.logits(tokens) - want).max(-1)
    assert off[:40].max() < 1e-3
    assert off[60:].min() > 1e-2
    assert any("looks back 40 tokens only" in note for note in notes(path.parent / "hf", tmp_path))


def notes(source, tmp_path):
    return convert(source, tmp_path / "noted.gguf", force=True).notes


def test_what_llama_cpp_computes_in_full_gets_no_note(tmp_path):
    for i, settings in enumerate(
        (
            {"family": "mistral"},
            {"family": "mistral", "sliding_window": 512},
            {"family": "mixtral"},
            {"family": "llama"},
            {"family": "baichuan-7b"},
        )
    ):
        assert notes(tiny.checkpoint(tmp_path / str(i), **settings), tmp_path) == ()


def test_dynamic_rope_scaling_is_noted(tmp_path):
    source = tiny.checkpoint(tmp_path / "hf", "internlm2", rope_scaling={"type": "dynamic", "factor": 2.0})
    assert any("dynamic rope scaling begins beyond 512 tokens" in note for note in notes(source, tmp_path))


def test_absent_keys_mean_what_they_mean_to_transformers(tmp_path):
    """8 key-value heads for Mistral and Mixtral, heads of 128 for Qwen 3."""
    transformers = pytest.importorskip("transformers")
    for family, absent in (
        ("mistral", ("num_key_value_heads", "sliding_window", "max_position_embeddings")),
        (
            "mixtral",
            ("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rope_theta", "max_position_embeddings"),
        ),
        ("qwen3", ("num_key_value_heads", "head_dim", "max_position_embeddings")),
    ):
        source = tiny.checkpoint(tmp_path / family, family)
        config = json.loads((source / "config.json").read_text()) | {"num_attention_heads": 32, "hidden_size": 128}
        config = {key: value for key, value in config.items() if key not in absent}
        (source / "config.json").write_text(json.dumps(config))
        theirs = transformers.AutoConfig.from_pretrained(source).to_dict()
        tiny.of_config(config)
        for key in absent:
            assert config.get(key) == (theirs["rope_parameters"] | theirs)[key], (family, key)


# InternLM 2


def test_a_piece_of_nul(tmp_path):
    """InternLM 2 has one. llama.cpp cannot hold it (it says [EMPTY_n]); nothing else becomes of it."""
    source = tiny.checkpoint(tmp_path / "hf", "internlm2", vocab="spm-unused")
    model = spm_pb2.ModelProto()
    model.ParseFromString((source / "tokenizer.model").read_bytes())
    model.pieces[300].piece = "\0"
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    path = convert(source, tmp_path / "m.gguf").path
    with Model(path, n_ctx=64) as loaded:
        assert 300 not in loaded.tokenize("量化\0🐉", add_special=False, parse_special=False)
        assert np.isfinite(loaded.logits([5, 300])).all()
    model.ParseFromString((to_hf(path, tmp_path / "back").path / "tokenizer.model").read_bytes())
    assert model.pieces[300].piece == "\0"


# Yi


def test_the_first_yi_is_a_llama_under_other_names(tmp_path):
    """ln1 and ln2; the file is that of the later releases, which are LlamaForCausalLM."""
    later = tiny.checkpoint(tmp_path / "later", "llama", vocab="spm-symbols", rope_theta=5000000.0)
    first = tiny.checkpoint(tmp_path / "first", "yi", vocab="spm-symbols")
    names = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    tensors = load_file(later / "model.safetensors")
    renamed = {".".join(names.get(part, part) for part in name.split(".")): value for name, value in tensors.items()}
    save_file(renamed, first / "model.safetensors")
    one = convert(later, tmp_path / "later.gguf", name="yi").path
    two = convert(first, tmp_path / "first.gguf", name="yi").path
    assert GgufFile(one).fields == GgufFile(two).fields
    assert {n: GgufFile(one).tensor(n).data.tobytes() for n in GgufFile(one).tensors} == {
        n: GgufFile(two).tensor(n).data.tobytes() for n in GgufFile(two).tensors
    }


def test_a_chat_of_yi_ends_where_its_symbol_stands(gguf):
    """<|im_end|> is a symbol of the tokenizer.model, no bos is put before a text, and eos is <|endoftext|>."""
    path = gguf(vocab="spm-symbols")
    file = GgufFile(path)
    tokens = file.fields["tokenizer.ggml.tokens"]
    ids = [tokens.index(t) for t in ("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    assert [file.fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")] == ids[:2]
    with Model(path, n_ctx=64) as model:
        found = model.tokenize("<|im_start|>user\n好<|im_end|>", add_special=True, parse_special=True)
        assert (found[0], found[-1]) == tuple(ids[2:])
        assert model.ends(ids[1]) and model.ends(ids[3])


# Vocabularies that an adapter extended


@pytest.mark.parametrize("family", ["mistral", "mixtral", "internlm2", "baichuan-7b", "baichuan2-7b", "yi", "qwen3"])
def test_an_extended_vocabulary(family, tmp_path):
    """Tokens added behind the tokenizer.model's 420, with an embedding as large, or padded to a multiple of 8."""
    for rows in (424, 432):
        source = tiny.checkpoint(tmp_path / f"{rows}", family, vocab="spm-added", vocab_size=rows)
        done = convert(source, tmp_path / f"{rows}.gguf")
        assert done.n_vocab == rows
        file = GgufFile(done.path)
        assert file.tensors["token_embd.weight"].shape == file.tensors["output.weight"].shape == (rows, 64)
        assert file.fields["tokenizer.ggml.tokens"][420:424] == ["[PAD]", "<|im_start|>", "<|im_end|>", "量化"]
        with Model(done.path, n_ctx=64) as model:
            assert model.tokenize("量化", add_special=False, parse_special=False)[-1] == 423
            assert model.logits([5, 423, 6]).shape == (3, rows)
    source = tiny.checkpoint(tmp_path / "base", family, vocab="spm-added", vocab_size=420)
    with pytest.raises(VocabMismatch, match="424 tokens, the embedding 420 rows"):
        convert(source, tmp_path / "base.gguf")

"""Meta's consolidated.*.pth: the same tensors, GGUF and Hugging Face directory as from the model's Hugging Face form."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_meta
from test_bad_input import JUNK, Malicious, damaged, edited, refused, run, with_junk
from test_build import run as build
from tiny_meta import torch

from cnq.checkpoint import open_checkpoint
from cnq.checkpoint.digest import content_digest
from cnq.checkpoint.meta_params import config_of, feed_forward
from cnq.convert import convert
from cnq.errors import CnqError, UnsupportedVocab
from cnq.gguf_file import GgufFile
from cnq.steps import RECORD
from cnq.to_hf import to_hf

GQA = {"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 128}
LLAMA3 = {"embedding_dim": 0, "rope_theta": 500000.0}

# name -> (arguments of tiny.checkpoint, of tiny_meta.checkpoint)
CASES = {
    "1 shard": ({}, {}),
    "1 shard, bf16": ({"dtype": "BF16"}, {}),
    "1 shard, f32": ({"dtype": "F32", "vocab": "spm-added"}, {}),
    "no GQA": ({"num_key_value_heads": 4}, {"shards": 4, "n_kv_heads": None}),
    "2 shards": ({}, {"shards": 2}),
    "4 shards": (GQA, {"shards": 4, "multiple_of": 96, "ffn_dim_multiplier": 0.2}),
    "8 shards": (GQA, {"shards": 8, "multiple_of": None, "ffn_dim_multiplier": None}),
    "nested params": ({}, {"nested": True, "vocab_size": 420}),
    "Code Llama": ({"rope_theta": 1e6, "max_position_embeddings": 16384}, {"rope_theta": 1e6}),
    "LLaMA 1": ({"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}, {"shards": 2}),
    "LLaMA 3": ({"vocab": "llama-bpe", "rope_theta": 5e5, "max_position_embeddings": 8192}, LLAMA3),
    "LLaMA 3, 2 shards": ({"vocab": "llama-bpe", "rope_theta": 5e5, "max_position_embeddings": 8192}, LLAMA3 | {"shards": 2}),
    "tied": ({"tie_word_embeddings": True}, {}),
}


def odd(folder: Path) -> Path:
    """A vocabulary of 421, as 49,953 is: SentencePiece's 420 and [PAD]."""
    hf = tiny.checkpoint(folder)
    (hf / "added_tokens.json").write_text('{"[PAD]": 420}')
    edited(hf / "config.json", vocab_size=421)
    tiny.weights(hf, json.loads((hf / "config.json").read_text()), "F16")
    return hf


def pair(tmp_path: Path, case: str) -> tuple[Path, Path]:
    """The model in Hugging Face's form and in Meta's."""
    settings, layout = CASES[case]
    hf = tiny.checkpoint(tmp_path / "hf", **({"max_position_embeddings": 4096} | settings))
    return hf, tiny_meta.checkpoint(hf, tmp_path / "meta", **layout)


def same_ggufs(hf: Path, meta: Path, folder: Path) -> None:
    want, got = (GgufFile(convert(src, folder / f"{i}.gguf", name="Model").path) for i, src in enumerate((hf, meta)))
    assert got.tensors.keys() == want.tensors.keys()
    for name, info in want.tensors.items():
        assert got.tensors[name].type == info.type
        assert got.tensor(name).data.tobytes() == want.tensor(name).data.tobytes(), name
    differing = {key for key in want.fields.keys() | got.fields.keys() if want.fields.get(key) != got.fields.get(key)}
    assert not {key for key in differing if not key.startswith("general.")}


@pytest.mark.parametrize("case", CASES)
def test_the_gguf_is_that_of_the_hugging_face_form(tmp_path, case):
    same_ggufs(*pair(tmp_path, case), tmp_path)


@pytest.mark.parametrize("case", ["1 shard", "1 shard, bf16", "1 shard, f32", "8 shards", "LLaMA 3, 2 shards", "tied"])
def test_the_hugging_face_directory_is_bit_identical(tmp_path, case):
    """Every tensor in the type it was trained in, fp16 in fp16."""
    hf, meta = pair(tmp_path, case)
    back = to_hf(meta, tmp_path / "back", max_shard_bytes=100_000).path
    assert len(list(back.glob("model-*.safetensors"))) > 1
    old, new = open_checkpoint(hf), open_checkpoint(back)
    assert new.entries.keys() == old.entries.keys()
    for name, entry in old.entries.items():
        assert new.entries[name] == entry
        assert new.read(name).data.tobytes() == old.read(name).data.tobytes(), name
    assert content_digest(open_checkpoint(meta)) == content_digest(old) == content_digest(new)
    assert {key: new.config.get(key) for key in old.config} == old.config


def test_the_remainder_of_an_odd_vocabulary_is_kept(tmp_path):
    """13B of Chinese-LLaMA: 49,953 rows of output are 24,976 and 24,977."""
    hf = odd(tmp_path / "hf")
    edited(hf / "config.json", max_position_embeddings=4096)
    meta = tiny_meta.checkpoint(hf, tmp_path / "meta", shards=2)
    rows = [torch.load(meta / f"consolidated.0{i}.pth", weights_only=True)["output.weight"].shape[0] for i in (0, 1)]
    assert rows == [210, 211]
    same_ggufs(hf, meta, tmp_path)


def test_what_was_read_is_let_go(tmp_path, monkeypatch):
    """Mappings are made anew every 128 MB, here at every tensor: what a model takes does not grow with its size."""
    hf, meta = pair(tmp_path, "8 shards")
    monkeypatch.setattr("cnq.checkpoint.torch_file._MOST_TOUCHED", 0)
    assert content_digest(open_checkpoint(meta)) == content_digest(open_checkpoint(hf))


def test_mixed_types_stay_mixed(tmp_path):
    """fp16 matrices with norms in float32: what early conversions and merges left behind."""
    meta = tiny_meta.checkpoint(tiny.checkpoint(tmp_path / "hf"), tmp_path / "meta")
    state = torch.load(meta / "consolidated.00.pth", weights_only=True)
    state["norm.weight"] = state["norm.weight"].float() + 1e-6
    state["output.weight"] = state["output.weight"].bfloat16()
    torch.save(state, meta / "consolidated.00.pth")
    back = open_checkpoint(to_hf(meta, tmp_path / "back").path)
    types = {
        name: back.entries[name].type.name for name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight")
    }
    assert types == {"model.norm.weight": "F32", "lm_head.weight": "BF16", "model.embed_tokens.weight": "F16"}
    assert np.array_equal(back.read("model.norm.weight").data, state["norm.weight"].numpy())


def logits(state: dict, params: dict, ids: list[int]):
    """Meta's own model, in float32: llama/model.py of LLaMA 2, written again without cache and parallel layers."""
    state = {name: tensor.float() for name, tensor in state.items()}
    heads, kv, size = params["n_heads"], params["n_kv_heads"], params["dim"] // params["n_heads"]
    freqs = 1.0 / (10000.0 ** (torch.arange(0, size, 2).float() / size))
    turns = torch.outer(torch.arange(len(ids)), freqs)
    turns = torch.polar(torch.ones_like(turns), turns)[:, None, :]

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * state[name]

    def turned(x):  # pairs of neighbours as complex numbers
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(2)

    h = state["tok_embeddings.weight"][ids]
    for i in range(params["n_layers"]):
        w = {name.removeprefix(f"layers.{i}."): tensor for name, tensor in state.items() if name.startswith(f"layers.{i}.")}
        x = norm(h, f"layers.{i}.attention_norm.weight")
        q, k, v = ((x @ w[f"attention.w{c}.weight"].T).view(len(ids), -1, size) for c in "qkv")
        q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + torch.full((len(ids), len(ids)), float("-inf")).triu(1)
        h = h + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["attention.wo.weight"].T
        x = norm(h, f"layers.{i}.ffn_norm.weight")
        gate = torch.nn.functional.silu(x @ w["feed_forward.w1.weight"].T)
        h = h + (gate * (x @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(h, "norm.weight") @ state["output.weight"].T


def test_transformers_computes_what_metas_model_computes(tmp_path):
    transformers = pytest.importorskip("transformers")
    meta = tiny_meta.checkpoint(tiny.checkpoint(tmp_path / "hf", dtype="F32"), tmp_path / "meta")
    model = transformers.AutoModelForCausalLM.from_pretrained(to_hf(meta, tmp_path / "back").path)
    ids = [1, 60, 200, 300, 7, 8, 9, 400]
    state = torch.load(meta / "consolidated.00.pth", weights_only=True)
    want = logits(state, json.loads((meta / "params.json").read_text()), ids)
    with torch.no_grad():
        got = model(torch.tensor([ids])).logits[0]
    assert torch.allclose(got, want, atol=1e-4), (got - want).abs().max()  # float32 sums in another order


# The tokenizer


def test_the_tokenizer_may_lie_one_folder_up(tmp_path):
    """As a download has it: llama/tokenizer.model, llama/7B/consolidated.00.pth."""
    hf = tiny.checkpoint(tmp_path / "hf", max_position_embeddings=4096)
    meta = tiny_meta.checkpoint(hf, tmp_path / "llama" / "7B")
    (meta / "tokenizer_config.json").unlink()
    (meta / "tokenizer.model").rename(meta.parent / "tokenizer.model")
    same_ggufs(hf, meta, tmp_path)
    transformers = pytest.importorskip("transformers")
    back = to_hf(meta, tmp_path / "back").path
    assert (back / "tokenizer.model").read_bytes() == (hf / "tokenizer.model").read_bytes()
    old, new = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (hf, back))
    for text in tiny.SENTENCES:
        assert new.encode(text) == old.encode(text)


def test_from_within_the_folder(tmp_path, monkeypatch):
    meta = tiny_meta.checkpoint(tiny.checkpoint(tmp_path / "hf"), tmp_path / "llama" / "7B")
    (meta / "tokenizer.model").rename(meta.parent / "tokenizer.model")
    monkeypatch.chdir(meta)
    assert run("convert", ".", "../out.gguf").exit_code == 0


def test_without_a_tokenizer_the_tensors_can_be_read_still(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf")
    meta = tiny_meta.checkpoint(hf, tmp_path / "a" / "meta")
    (meta / "tokenizer.model").unlink()
    checkpoint = open_checkpoint(meta)
    assert content_digest(checkpoint) == content_digest(open_checkpoint(hf))
    with pytest.raises(UnsupportedVocab, match=r"nor the folder above it has tokenizer\.model"):
        checkpoint.tokenizer(tmp_path)


# What params.json leaves open


@pytest.mark.parametrize(
    ("params", "llama3", "context"),
    [
        ({"norm_eps": 1e-6}, False, 2048),
        ({"dim": 6656, "n_heads": 52}, False, 2048),
        ({"dim": 8192, "n_heads": 64}, False, 2048),
        ({"dim": 8192, "n_heads": 64, "n_kv_heads": 8}, False, 4096),
        ({}, False, 4096),
        ({"rope_theta": 1e6}, False, 16384),
        ({"rope_theta": 5e5}, True, 8192),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, True, 131072),
    ],
)
def test_the_context_is_that_of_the_release(tmp_path, params, llama3, context):
    params = {"dim": 4096, "n_layers": 1, "n_heads": 32, "norm_eps": 1e-5} | params
    rows = params["dim"] // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    shapes = {"tok_embeddings.weight": (32000, params["dim"]), "layers.0.feed_forward.w1.weight": (11008, params["dim"]),
              "layers.0.attention.wk.weight": (rows, params["dim"])}  # fmt: skip
    config, notes = config_of(tmp_path, params, shapes, llama3=llama3, tied=False)
    assert config["max_position_embeddings"] == context
    assert any(f"{context} tokens" in note for note in notes)


@pytest.mark.parametrize(("tied", "factor"), [(False, 8.0), (True, 32.0)])
def test_scaled_rope_is_llama_3_1s_or_3_2s(tmp_path, tied, factor):
    """LLaMA 3.2 is the one whose output is its embedding, which its files hold twice."""
    hf = tiny_meta.llama3(tmp_path)
    meta = tiny_meta.checkpoint(hf, tmp_path / "meta", **LLAMA3, use_scaled_rope=True)
    if tied:
        state = torch.load(meta / "consolidated.00.pth", weights_only=True)
        torch.save(state | {"output.weight": state["tok_embeddings.weight"]}, meta / "consolidated.00.pth")
    checkpoint = open_checkpoint(meta)
    assert checkpoint.config["rope_scaling"] == {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    assert checkpoint.config["tie_word_embeddings"] == tied == ("lm_head.weight" not in checkpoint.entries)
    notes = " ".join(checkpoint.notes)
    assert f"by how much rope is scaled: {factor:g}" in notes
    assert "--format llama-3" in notes
    assert ("output.weight left out" in notes) == tied
    file = GgufFile(convert(meta, tmp_path / "m.gguf").path)
    assert file.fields["tokenizer.ggml.tokens"][tiny_meta.N_RANKS + 8] == "<|eom_id|>"
    assert "rope_freqs.weight" in file.tensors
    restored = open_checkpoint(to_hf(meta, tmp_path / "back").path)
    assert restored.config["rope_scaling"] == checkpoint.config["rope_scaling"]


def test_what_others_merge_scripts_leave_out_is_taken_from_the_tensors_aloud(tmp_path):
    """pth files of Chinese-LLaMA-Alpaca-3's merge script lack n_kv_heads and rope_theta."""
    meta = tiny_meta.checkpoint(
        tiny_meta.llama3(tmp_path), tmp_path / "meta", embedding_dim=0, n_kv_heads=None, vocab_size=32000
    )
    checkpoint = open_checkpoint(meta)
    assert (checkpoint.config["num_key_value_heads"], checkpoint.config["rope_theta"]) == (2, 500000.0)
    notes = " ".join(checkpoint.notes)
    for said in ("n_kv_heads: 2", "rope_theta: 500000", "vocab_size 32000, the embedding has 656 rows"):
        assert said in notes


def test_metas_sizes_of_the_feed_forward_layer():
    sizes = {(4096, 256, None): 11008, (5120, 256, None): 13824, (6656, 256, None): 17920, (8192, 256, None): 22016,
             (8192, 4096, 1.3): 28672, (4096, 1024, 1.3): 14336, (2048, 256, 1.5): 8192, (3072, 256, 1.0): 8192}  # fmt: skip
    assert {key: feed_forward(*key) for key in sizes} == sizes


# The road


def test_hugging_face_weights_beside_consolidated_files_are_taken(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf")
    (hf / "consolidated.00.pth").write_bytes(b"")
    assert run("convert", hf, tmp_path / "out.gguf").exit_code == 0
    meta = tiny_meta.checkpoint(tiny.checkpoint(tmp_path / "other"), tmp_path / "meta")
    shutil.copy(hf / "config.json", meta)  # a config.json alone does not make it one
    assert run("convert", meta, tmp_path / "out2.gguf").exit_code == 0


def test_build_takes_metas_layout(tmp_path):
    meta = tiny_meta.checkpoint(tiny.checkpoint(tmp_path / "hf", **GQA), tmp_path / "llama" / "7B", shards=2, multiple_of=96,
                                ffn_dim_multiplier=0.2)  # fmt: skip
    (meta / "tokenizer.model").rename(meta.parent / "tokenizer.model")
    built, _ = build(meta, tmp_path / "out", ("Q8_0",), format="llama-2")
    assert [made.path.name for made in built.files] == ["7B-F16.gguf", "7B-Q8_0.gguf"]
    assert any("length of the context" in note for note in built.files[0].notes)
    _, kept = build(meta, tmp_path / "out", ("Q8_0",), format="llama-2")
    assert kept == ["7B-F16.gguf", "7B-Q8_0.gguf"]
    record = json.loads((tmp_path / "out" / f"7B-F16.gguf{RECORD}").read_text())
    assert "tokenizer.model" in record["inputs"]


# Bad input


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    return tiny_meta.checkpoint(tiny.checkpoint(folder / "hf"), folder / "meta", shards=2)


def state(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def changed(file: str, change):
    """Spoil one shard: `change` gets its tensors."""

    def spoil(folder: Path) -> None:
        tensors = state(folder / file)
        change(tensors)
        torch.save(tensors, folder / file)

    return spoil


def replaced(name: str, of):
    return changed("consolidated.01.pth", lambda tensors: tensors.update({name: of(tensors[name])}))


def params(**changes):
    return lambda folder: edited(folder / "params.json", **changes)


def renamed(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)


WK = "layers.1.attention.wk.weight"
BAD = {
    "shard 01 missing": (lambda m: (m / "consolidated.01.pth").unlink(),
                         ("1 of 2 shards are missing: consolidated.01.pth", "Finish the download")),
    "shard 00 missing": (lambda m: (m / "consolidated.00.pth").unlink(), ("1 of 2 shards are missing: consolidated.00.pth",)),
    "a gap": (renamed("consolidated.01.pth", "consolidated.02.pth"), ("1 of 3 shards are missing: consolidated.01.pth",)),
    "one too many": (lambda m: shutil.copy(m / "consolidated.01.pth", m / "consolidated.02.pth"),
                     ("has 3 shards, each of which is one of 2", "different models")),
    "cut short": (lambda m: os.truncate(m / "consolidated.01.pth", 30_000), ("consolidated.01.pth is damaged",)),
    "empty": (lambda m: (m / "consolidated.00.pth").write_bytes(b""), ("consolidated.00.pth is damaged",)),
    "a pointer": (lambda m: (m / "consolidated.00.pth").write_text("version https://git-lfs.github.com/spec/v1\n"),
                  ("consolidated.00.pth is damaged",)),
    "other sizes": (replaced("layers.0.feed_forward.w1.weight", lambda w: w[:40]),
                    ("feed_forward.w1.weight is F16 (48, 64) in consolidated.00.pth, F16 (40, 64) in consolidated.01.pth",
                     "different models")),
    "other width": (replaced(WK, lambda w: torch.zeros(16, 32).half()), (f"{WK} is", "which make no whole")),
    "other type": (replaced(WK, lambda w: w.float()), (f"{WK} is F16 (16, 64) in", "F32 (16, 64) in consolidated.01.pth")),
    "integers": (replaced(WK, lambda w: w.int()), ("torch.int32", "expected F32, F16 or BF16")),
    "a number": (replaced(WK, lambda w: torch.tensor(1.0)), (f"{WK} is", "which make no whole")),
    "other norms": (replaced("norm.weight", lambda w: w * 2),
                    ("norm.weight is not the same in consolidated.00.pth and consolidated.01.pth", "different models")),
    "a norm that is not finite": (replaced("norm.weight", lambda w: w * float("nan")), ("norm.weight is not the same in",)),
    "a tensor missing": (changed("consolidated.01.pth", lambda t: t.pop(WK)),
                         ("consolidated.01.pth: 1 of 21 tensors are missing", WK)),
    "output in one shard only": (changed("consolidated.01.pth", lambda t: t.pop("output.weight")), ("missing: output.weight",)),
    "an adapter in it": (changed("consolidated.00.pth", lambda t: t.update({"layers.0.attention.wq.lora_A": torch.zeros(1)})),
                         ("tensors that LLaMA", "does not have: layers.0.attention.wq.lora_A")),
    "no params": (lambda m: (m / "params.json").unlink(), ("has consolidated.*.pth but no params.json", "own download")),
    "params: no JSON": (lambda m: (m / "params.json").write_text("{"), ("params.json cannot be read as JSON",)),
    "params: text": (params(model="7B"), ("model is '7B', expected an object",)),
    "params: no dim": (params(dim=None), ("dim is None, expected a whole number",)),
    "params: a billion layers": (params(n_layers=10**9), ("n_layers is 1000000000", "512")),
    "params: no heads": (params(n_heads=0), ("n_heads is 0",)),
    "params: heads that do not divide": (params(n_heads=3), ("n_heads is 3, expected a divisor of dim, which is 64",)),
    "params: epsilon": (params(norm_eps="small"), ("norm_eps is 'small', expected a number above 0",)),
    "params: theta": (params(rope_theta=-1), ("rope_theta is -1",)),
    "params: fewer layers": (params(n_layers=1), ("layers.1.attention.wq.weight", "params.json is of another model")),
    "params: more layers": (params(n_layers=3), ("9 of 30 tensors are missing: layers.2.",)),
    "params: other width": (params(dim=128, multiple_of=None), ("by params.json", "different models")),
    "params: other kv heads": (params(n_kv_heads=4), ("attention.wk has 32 rows", "n_kv_heads 4", "should have 64")),
    "params: other feed-forward": (params(multiple_of=256), ("feed_forward.w1 has 96 rows", "it should have 256")),
    "tokenizer: missing": (lambda m: (m / "tokenizer.model").unlink(),
                           ("has tokenizer.model", "Take it from the model's own download")),
    "tokenizer: of another model": (lambda m: tiny_meta.ranks(m / "tokenizer.model"), ("656 tokens, the embedding 420 rows",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_directory_that_is_no_model(case, sound, tmp_path):
    model = tmp_path / "in" / "model"
    shutil.copytree(sound, model)
    spoil, saying = BAD[case]
    spoil(model)
    refused(tmp_path, "convert", model, tmp_path / "out.gguf", saying=saying)


def test_one_of_the_files(sound, tmp_path):
    file = sound / "consolidated.00.pth"
    refused(tmp_path, "convert", file, tmp_path / "o.gguf", saying=(f"one file of a checkpoint. Give its directory: {sound}",))


def test_shards_of_two_models_of_one_size_are_noticed(sound, tmp_path):
    """Fine-tuning moves norms a little: not enough to refuse what may be rounding, but it is said."""
    model = tmp_path / "model"
    shutil.copytree(sound, model)
    replaced("layers.1.ffn_norm.weight", lambda w: w + 0.01)(model)
    assert "layers.1.ffn_norm.weight in consolidated.01.pth" in " ".join(open_checkpoint(model).notes)


def test_a_pickle_that_runs_code_is_refused(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "model")
    torch.save({"norm.weight": Malicious(tmp_path / "owned")}, tmp_path / "model" / "consolidated.01.pth")
    message = refused(tmp_path, "convert", tmp_path / "model", tmp_path / "out.gguf", saying=("not plain weights", "io.open"))
    assert "weights_only" not in message
    assert not (tmp_path / "owned").exists()


def test_params_with_junk(sound, tmp_path):
    """Converting either works or raises a CnqError."""
    model = tmp_path / "model"
    shutil.copytree(sound, model)
    given = json.loads((model / "params.json").read_text())
    dice = random.Random(0)
    failed = 0
    for n in range(150):
        content = with_junk(given, dice) if n % 2 else given | {dice.choice(OTHER_PARAMS): dice.choice(JUNK)}
        (model / "params.json").write_text(json.dumps(content))
        try:
            convert(model, tmp_path / "out.gguf", force=True)
        except CnqError:
            failed += 1
    assert 50 < failed < 150
    assert {p.name for p in tmp_path.iterdir()} <= {"model", "out.gguf"}


OTHER_PARAMS = ["model", "rope_theta", "use_scaled_rope", "max_seq_len"]


@pytest.mark.parametrize("file", ["consolidated.00.pth", "tokenizer.model"])
def test_damaged_files(tmp_path, file):
    model = tmp_path / "model"
    meta = tiny_meta.checkpoint(tiny_meta.llama3(tmp_path / "made"), model, embedding_dim=0, rope_theta=5e5)
    raw = (meta / file).read_bytes()
    dice = random.Random(0)
    failed = 0
    for _ in range(100):
        (meta / file).write_bytes(damaged(raw, dice, 2000))
        try:
            convert(meta, tmp_path / "out.gguf", force=True)
        except CnqError:
            failed += 1
    assert 10 < failed <= 100
    assert {p.name for p in tmp_path.iterdir()} <= {"made", "model", "out.gguf"}

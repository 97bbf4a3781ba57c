"""Rows for new tokens: against torch and transformers, bit for bit where a rule has no chance in it."""

import json

import numpy as np
import pytest
import spm
import tiny
import tiny_meta

from cnq import files
from cnq.checkpoint import open_checkpoint
from cnq.convert import convert
from cnq.errors import CheckpointError, CnqError, NoSpace, VocabMismatch
from cnq.to_hf import write_hf
from training import embeddings
from training.embeddings import extended
from training.hf_tokenizer import write
from training.pieces import read_base
from training.vocabulary import merge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# 犇 is three bytes to the old tokenizer; 量化 two or one; "(的" begins as "▁(" there; "▁猋" is "▁" and three bytes
NEW = ["犇", "量化了", "越来越", "(的", "▁猋", "▁the犇", "abc我们"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(dtype=…, pad=…, **config) -> (base directory, its model, the merged one, the directory of its tokenizer)."""

    def make(pad=None, controls=(), **settings):
        place = tmp_path_factory.mktemp("rows")
        base = tiny.checkpoint(place / "base", **settings)
        old = read_base(base)
        new, _ = merge(old, [spm.chinese(NEW)], pad=pad, controls=controls)
        (place / "tokenizer").mkdir()
        write(new, place / "tokenizer", base)
        return base, old, new, place / "tokenizer"

    return make


def seeds_parts(base, token):
    """chinese-llama-65b's rule, by transformers: the old tokens of the token's text, a first "▁" dropped if more follow."""
    old = transformers.AutoTokenizer.from_pretrained(base, use_fast=False)
    parts = old.tokenize(token)
    return old.convert_tokens_to_ids(parts[1:] if parts[0] == "▁" and len(parts) > 1 else parts)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_mean_rows_are_the_seeds_rule_to_the_bit(made, dtype):
    base, old, new, tokenizer = made(dtype=dtype)
    grown = extended(open_checkpoint(base), old, new, tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for name, table in ((EMBEDDING, model.get_input_embeddings().weight), (HEAD, model.get_output_embeddings().weight)):
        found = values(grown, name)
        assert torch.equal(found[: len(old.pieces)], table.detach())
        for id in range(len(old.pieces), len(new.pieces)):
            text = new.pieces[id].piece
            if "▁" not in text:
                want = table.detach()[seeds_parts(base, text)].float().mean(0).to(table.dtype)
                assert torch.equal(found[id], want), text


def values(checkpoint, name):
    t = checkpoint.read(name)
    kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[t.type.name]
    return torch.from_numpy(np.ascontiguousarray(t.data)).view(-1).view(torch.uint8).view(kind).reshape(t.shape)


def test_a_space_in_front_of_a_piece_is_its_own(made):
    base, old, new, tokenizer = made(dtype="F32")
    grown = extended(open_checkpoint(base), old, new, tokenizer)
    table = open_checkpoint(base).read(EMBEDDING).float32()
    exact = spm.encoder(old)
    rows = values(grown, EMBEDDING).numpy()
    ids = spm.encoder(new).piece_to_id
    assert exact.encode("the犇", out_type=str)[0] == "▁the"
    assert np.array_equal(rows[ids("▁the犇")], table[exact.encode("the犇")].mean(axis=0))
    assert np.array_equal(rows[ids("▁猋")], table[exact.encode("猋")[1:]].mean(axis=0))  # the bytes, without the "▁"


def test_normal_rows_are_distributed_as_transformers_resizes(made):
    """Random numbers are not the same ones: mean and deviation are compared, each within five of its standard errors."""
    base, old, new, tokenizer = made(dtype="F32", hidden_size=512, initializer_range=0.05)
    checkpoint = open_checkpoint(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(new.pieces), mean_resizing=False)
    theirs = model.get_input_embeddings().weight.detach().numpy()[len(old.pieces) :]
    ours = {
        (seed, name): values(extended(checkpoint, old, new, tokenizer, rule="normal", seed=seed), name).numpy()[
            len(old.pieces) :
        ]
        for seed in (0, 1)
        for name in (EMBEDDING, HEAD)
    }
    for rows in (theirs, *ours.values()):
        assert abs(rows.mean()) < 5 * 0.05 / rows.size**0.5
        assert abs(rows.std() / 0.05 - 1) < 5 / (2 * rows.size) ** 0.5
    kinds = list(ours.values())
    assert not any(np.array_equal(a, b) for i, a in enumerate(kinds) for b in kinds[:i])
    again = values(extended(checkpoint, old, new, tokenizer, rule="normal", seed=1), HEAD).numpy()[len(old.pieces) :]
    assert np.array_equal(again, ours[1, HEAD])


def test_rows_come_in_blocks_of_any_number(made, monkeypatch):
    base, old, new, tokenizer = made()
    want = {r: values(extended(open_checkpoint(base), old, new, tokenizer, rule=r), HEAD) for r in embeddings.RULES}
    monkeypatch.setattr(embeddings, "_STEP", 3)
    for rule, rows in want.items():
        assert torch.equal(values(extended(open_checkpoint(base), old, new, tokenizer, rule=rule), HEAD), rows)


def test_padding_rows_copy_the_unknown_token_s(made, tmp_path):
    base, old, new, tokenizer = made(pad="[PAD]")
    assert len(new.pieces) % 16
    grown = extended(open_checkpoint(base), old, new, tokenizer, multiple=16)
    rows = grown.config["vocab_size"]
    assert rows % 16 == 0 and 0 < rows - len(new.pieces) < 16
    assert grown.config["pad_token_id"] == len(new.pieces) - 1
    for name in (EMBEDDING, HEAD):
        table = values(grown, name)
        assert all(torch.equal(row, table[old.trainer_spec.unk_id]) for row in table[len(new.pieces) :])
        assert not torch.equal(table[len(new.pieces) - 1], table[old.trainer_spec.unk_id])
    written = write_hf(grown, tmp_path / "hf").path
    converted = convert(written, tmp_path / "m.gguf")
    assert converted.n_vocab == rows and any("padding" in note for note in converted.notes)
    assert len(transformers.AutoTokenizer.from_pretrained(written)) == len(new.pieces)


@pytest.mark.parametrize("settings", [{"dtype": "F16", "shards": 3}, {"dtype": "BF16", "tie_word_embeddings": True}])
def test_everything_else_is_untouched_and_transformers_runs_it(made, settings, tmp_path):
    base, old, new, tokenizer = made(pad="[PAD]", **settings)
    tied = settings.get("tie_word_embeddings", False)
    grown = extended(open_checkpoint(base), old, new, tokenizer)
    out = write_hf(grown, tmp_path / "hf").path
    before = {name: data for path in base.glob("*.safetensors") for name, data in raw(path).items()}
    after = {name: data for path in out.glob("*.safetensors") for name, data in raw(path).items()}
    assert before.keys() == after.keys() and (HEAD in after) != tied
    for name, data in before.items():
        if name in (EMBEDDING, HEAD):
            assert after[name][: len(data)] == data and len(after[name]) > len(data)
        else:
            assert after[name] == data, name
    config, was = (json.loads((folder / "config.json").read_text()) for folder in (out, base))
    changed = {key for key in config if config.get(key) != was.get(key)}
    assert changed == {"vocab_size", "pad_token_id", "torch_dtype"} and config["vocab_size"] == len(new.pieces)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    base_model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert model.get_input_embeddings().weight.shape[0] == len(new.pieces)
    ids = torch.tensor([spm.encoder(old).encode("The quick brown fox")])
    with torch.no_grad():  # old tokens in, old tokens out: the same logits
        assert torch.equal(model(ids).logits[..., : len(old.pieces)], base_model(ids).logits)


def raw(path):
    """Tensor name -> its bytes."""
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    header.pop("__metadata__", None)
    return {name: content[8 + n + t["data_offsets"][0] : 8 + n + t["data_offsets"][1]] for name, t in header.items()}


def test_a_base_in_metas_layout_gives_the_same_model(made, tmp_path):
    base, old, new, tokenizer = made(dtype="F16")
    meta = tiny_meta.checkpoint(base, tmp_path / "meta", shards=2)
    one, two = (
        write_hf(extended(open_checkpoint(path), old, new, tokenizer), tmp_path / name).path
        for path, name in ((base, "one"), (meta, "two"))
    )
    assert raw(one / "model.safetensors") == raw(two / "model.safetensors")
    assert {p.name: p.read_bytes() for p in one.glob("*token*")} == {p.name: p.read_bytes() for p in two.glob("*token*")}


def test_the_new_directory_s_tokenizer_is_the_merged_one(made, tmp_path):
    base, old, new, tokenizer = made()
    out = write_hf(extended(open_checkpoint(base), old, new, tokenizer), tmp_path / "hf").path
    assert {p.name: p.read_bytes() for p in tokenizer.iterdir()}.items() <= {
        p.name: p.read_bytes() for p in out.iterdir()
    }.items()


def test_a_model_of_another_tokenizer_is_refused(made):
    base, _, new, tokenizer = made()
    with pytest.raises(VocabMismatch, match="420 rows, the tokenizer to be extended 427 pieces"):
        extended(open_checkpoint(base), new, new, tokenizer)


def test_a_quantized_model_is_refused(made, tmp_path):
    base, old, new, tokenizer = made(vocab="spm")
    gguf = convert(base, tmp_path / "q8.gguf", dtype="q8_0").path
    with pytest.raises(CheckpointError, match="quantized"):
        extended(open_checkpoint(gguf), old, new, tokenizer)


def test_too_little_memory_is_said_before_anything_is_read(made, monkeypatch):
    base, old, new, tokenizer = made()
    checkpoint = open_checkpoint(base)
    monkeypatch.setattr(files, "free_memory", lambda: 100_000)
    with pytest.raises(NoSpace, match=r"of memory needed"):
        extended(checkpoint, old, new, tokenizer)


@pytest.mark.parametrize("multiple", [10, 256])
def test_a_multiple_that_conversion_would_not_take_for_padding_is_refused(made, multiple):
    base, old, new, tokenizer = made()
    with pytest.raises(CnqError, match="multiple of 8"):
        extended(open_checkpoint(base), old, new, tokenizer, multiple=multiple)

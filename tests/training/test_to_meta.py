"""Hugging Face → Meta's layout → Hugging Face: the same bits, in shards that are cut as Meta's are."""

import json
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
import tiny_meta
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_bad_input import edited
from test_meta import GQA, odd
from tiny_meta import torch

from cnq.checkpoint import open_checkpoint
from cnq.checkpoint.digest import content_digest
from cnq.checkpoint.meta_params import feed_forward
from cnq.convert import convert
from cnq.errors import CheckpointError, GgufError, NoSpace, OutputExists, UnsupportedArch
from cnq.to_hf import to_hf
from training.to_meta import feed_forward_rule, main, write_meta


def written(hf: Path, dst: Path, **options):
    return write_meta(open_checkpoint(hf), dst, **options)


def same_shards(got: Path, want: Path) -> None:
    """As plain torch.load reads them."""
    assert sorted(p.name for p in got.glob("*.pth")) == sorted(p.name for p in want.glob("*.pth"))
    for file in want.glob("*.pth"):
        ours, theirs = (torch.load(folder / file.name, weights_only=True) for folder in (got, want))
        theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("rope.freqs")}
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), (file.name, name)


@pytest.mark.parametrize(
    ("shards", "settings"),
    [
        (1, {}),
        (1, {"dtype": "F32"}),
        (2, {"dtype": "BF16", "vocab": "spm-added"}),
        (2, {"num_key_value_heads": 4, "dtype": "F32"}),
        (4, GQA | {"dtype": "BF16"}),
        (8, GQA),
        (8, GQA | {"vocab": "llama-bpe", "dtype": "F32"}),
        (2, {"shards": 3, "rms_norm_eps": 1e-6, "rope_theta": 1e6}),
    ],
)
def test_shards_are_metas_and_come_back_bit_identical(tmp_path, shards, settings):
    hf = tiny.checkpoint(tmp_path / "hf", **settings)
    result = written(hf, tmp_path / "meta", shards=shards)
    assert result.shards == shards
    dim = 0 if settings.get("vocab") == "llama-bpe" else 1
    same_shards(result.path, tiny_meta.checkpoint(hf, tmp_path / "want", shards=shards, embedding_dim=dim))
    back = to_hf(result.path, tmp_path / "back").path
    old, new = ({n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()} for folder in (hf, back))
    assert old.keys() == new.keys()
    assert all(new[name].dtype == tensor.dtype and torch.equal(new[name], tensor) for name, tensor in old.items())
    before, after = open_checkpoint(hf).config, open_checkpoint(back).config
    assert {key for key in before if before[key] != after.get(key)} == {"max_position_embeddings"}
    assert any("no place for max_position_embeddings, 512" in note for note in result.notes)


def test_the_remainder_of_an_odd_vocabulary_goes_to_the_last_shard(tmp_path):
    """13B of Chinese-LLaMA: 49,953 rows; the authors' first script lost the last."""
    hf = odd(tmp_path / "hf")
    result = written(hf, tmp_path / "meta", shards=2)
    parts = [torch.load(tmp_path / "meta" / f"consolidated.0{i}.pth", weights_only=True) for i in (0, 1)]
    assert [part["output.weight"].shape for part in parts] == [(210, 64), (211, 64)]
    assert [part["tok_embeddings.weight"].shape for part in parts] == [(421, 32), (421, 32)]
    assert content_digest(open_checkpoint(result.path)) == content_digest(open_checkpoint(hf))
    assert any("the last shard has 1 more rows" in note for note in result.notes)
    tokens = convert(tmp_path / "meta", tmp_path / "m.gguf")
    assert tokens.n_vocab == 421


def test_params_json_is_complete(tmp_path):
    def params(name: str, **settings):
        hf = tiny.checkpoint(tmp_path / name, **settings)
        written(hf, tmp_path / f"{name}-meta")
        return json.loads((tmp_path / f"{name}-meta" / "params.json").read_text())

    old = params("old", num_key_value_heads=4, hidden_size=64, intermediate_size=256)
    assert old == {"dim": 64, "multiple_of": 256, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-5, "vocab_size": 420}
    new = params("new", vocab="llama-bpe", rope_theta=500000.0)
    assert feed_forward(new["dim"], new.pop("multiple_of"), new.pop("ffn_dim_multiplier")) == 96
    assert new == {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "norm_eps": 1e-5, "vocab_size": 421,
                   "rope_theta": 500000.0}  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "size", "rule"),
    [
        (4096, 11008, (256, None)), (5120, 13824, (256, None)), (6656, 17920, (256, None)), (8192, 22016, (256, None)),
        (8192, 28672, (4096, 1.3)), (4096, 14336, (1024, 1.3)), (3072, 8192, (256, None)),
    ],
)  # fmt: skip
def test_the_feed_forward_rule_is_metas_own(dim, size, rule):
    """LLaMA 1 and 2 7B, 13B, 33B, 65B and 70B, LLaMA 3 8B; 3.2 3B goes without its multiplier of 1.0."""
    assert feed_forward_rule(dim, size) == rule


@given(dim=st.integers(1, 20000), size=st.integers(1, 70000))
def test_there_is_a_feed_forward_rule_for_every_size(dim, size):
    assert feed_forward(dim, *feed_forward_rule(dim, size)) == size


def test_llama_3_has_its_embedding_cut_by_rows_and_its_tokenizer_back(tmp_path):
    first = tiny_meta.checkpoint(
        tiny_meta.llama3(tmp_path), tmp_path / "first", embedding_dim=0, rope_theta=5e5, use_scaled_rope=True
    )
    hf = to_hf(first, tmp_path / "back").path
    assert not (hf / "tokenizer.model").exists()
    result = written(hf, tmp_path / "meta", shards=2)
    same_shards(result.path, tiny_meta.checkpoint(tmp_path / "hf", tmp_path / "want", shards=2, embedding_dim=0))
    assert (result.path / "tokenizer.model").read_bytes() == (first / "tokenizer.model").read_bytes()
    assert open_checkpoint(result.path).config == open_checkpoint(first).config


def test_another_byte_level_tokenizer_stays_tokenizer_json_and_that_is_said(tmp_path):
    result = written(tiny.checkpoint(tmp_path / "hf", vocab="llama-bpe"), tmp_path / "meta")
    assert not (result.path / "tokenizer.model").exists()
    assert any("only tokenizer.json" in note for note in result.notes)


def test_a_tied_output_is_written_and_known_again(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf", tie_word_embeddings=True)
    result = written(hf, tmp_path / "meta", shards=2)
    parts = [torch.load(result.path / f"consolidated.0{i}.pth", weights_only=True) for i in (0, 1)]
    output = torch.cat([part["output.weight"] for part in parts])
    assert torch.equal(output, torch.cat([part["tok_embeddings.weight"] for part in parts], dim=1))
    assert content_digest(open_checkpoint(result.path)) == content_digest(open_checkpoint(hf))


def test_from_a_gguf(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf", dtype="F32")
    gguf = convert(hf, tmp_path / "f32.gguf", dtype="f32").path
    written(gguf, tmp_path / "meta")
    same_shards(tmp_path / "meta", tiny_meta.checkpoint(hf, tmp_path / "want"))
    small = convert(hf, tmp_path / "q8.gguf", dtype="q8_0").path
    with pytest.raises(CheckpointError, match=r"q8\.gguf is quantized \(.*Q8_0.*cnq to-hf"):
        written(small, tmp_path / "meta2")


# The files


def test_the_pickle_is_that_of_torch_save_and_the_zip_is_sound(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf", dtype="BF16")
    file = written(hf, tmp_path / "meta").path / "consolidated.00.pth"
    state = torch.load(file, weights_only=True)
    torch.save({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "theirs.pth")
    with zipfile.ZipFile(file) as ours, zipfile.ZipFile(tmp_path / "theirs.pth") as theirs:
        assert ours.testzip() is None
        assert ours.read("consolidated.00/data.pkl") == theirs.read("theirs/data.pkl")
        for i in range(len(state)):
            assert ours.read(f"consolidated.00/data/{i}") == theirs.read(f"theirs/data/{i}")
    mapped = torch.load(file, weights_only=True, mmap=True)
    assert all(torch.equal(mapped[name], tensor) for name, tensor in state.items())
    assert not any(tensor.data_ptr() % 64 for tensor in mapped.values())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf")
    one, two = (written(hf, tmp_path / name, shards=2).path for name in ("one", "two"))
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for file in one.iterdir():
        assert (two / file.name).read_bytes() == file.read_bytes()


def test_progress_ends_at_all_bytes(tmp_path):
    heard = []
    result = written(tiny.checkpoint(tmp_path / "hf"), tmp_path / "meta", shards=2, progress=lambda *a: heard.append(a))
    assert heard[-1] == (result.nbytes, result.nbytes)


# Refused


@pytest.mark.parametrize(
    ("settings", "error", "saying"),
    [
        ({"family": "qwen2"}, UnsupportedArch, "it is of Qwen2ForCausalLM, the layout holds LLaMA"),
        ({"attention_bias": True}, UnsupportedArch, "has no biases .attention_bias is set"),
        ({"mlp_bias": True}, UnsupportedArch, "has no biases .mlp_bias is set"),
        ({"head_dim": 32}, UnsupportedArch, "head_dim is 32, and 4 heads do not make hidden_size 64"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, UnsupportedArch, "rope_scaling is {'type': 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 16.0}}, UnsupportedArch, "params.json can say"),
        ({"num_key_value_heads": 1}, CheckpointError, "num_key_value_heads 1.*Give --shards 1"),
        ({"intermediate_size": 95}, CheckpointError, "intermediate_size 95.*Give --shards 1"),
    ],
)
def test_what_the_layout_cannot_hold(tmp_path, settings, error, saying):
    hf = tiny.checkpoint(tmp_path / "hf", **settings)
    with pytest.raises(error, match=saying):
        written(hf, tmp_path / "meta", shards=2)
    assert not (tmp_path / "meta").exists()


def test_a_value_that_is_not_finite(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf")
    state = load_file(hf / "model.safetensors")
    state["lm_head.weight"][5, 6] = float("inf")
    torch.save(state, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    with pytest.raises(GgufError, match=r"output\.weight: inf at row 5, column 6"):
        written(hf, tmp_path / "meta")
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_a_tensor_missing(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf")
    edited(hf / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="9 of 30 tensors are missing"):
        written(hf, tmp_path / "meta")


def test_an_output_that_is_there(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf")
    dst = written(hf, tmp_path / "meta").path
    with pytest.raises(OutputExists, match="--force"):
        written(hf, dst)
    written(hf, dst, force=True)
    with pytest.raises(OutputExists, match="other things in it"):
        written(dst, dst, force=True)  # it is its own source
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(OutputExists, match="other things in it"):
        written(hf, tmp_path / "thesis", force=True)


def test_the_disk_fills_up(tmp_path):
    """A limit on the size of files stands for a full disk."""
    hf = tiny.checkpoint(tmp_path / "hf")
    limit = (100_000, 100_000)
    done = subprocess.run(
        [sys.executable, "-m", "training.to_meta", hf, tmp_path / "meta"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit), env=None, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "meta cannot be written: File too large" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_no_room_is_said_beforehand(tmp_path, monkeypatch):
    hf = tiny.checkpoint(tmp_path / "hf")
    monkeypatch.setattr("cnq.files.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(NoSpace, match=r"needed, 1\.0 kB free"):
        written(hf, tmp_path / "meta")


# The commands


def test_the_command(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf")
    result = CliRunner().invoke(main, [str(hf), str(tmp_path / "meta"), "--shards", "2"])
    assert result.exit_code == 0, result.output
    assert "meta/: 2 shards, 21 tensors, 231.7 kB in " in result.stdout
    assert "note: params.json has no place for" in result.stderr
    again = CliRunner().invoke(main, [str(hf), str(tmp_path / "meta")])
    assert again.exit_code == 1
    assert again.stderr.splitlines()[-1].startswith("Error: ")


def test_to_hf_as_a_program(tmp_path):
    meta = tiny_meta.checkpoint(tiny.checkpoint(tmp_path / "hf"), tmp_path / "meta", shards=2)
    command = [sys.executable, "-m", "training.to_hf", meta, tmp_path / "back", "--max-shard-size", "0.1MB", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert json.loads(done.stdout)["n_tensors"] == 21
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) == 3
    assert all(f.stat().st_size < 110_000 for f in files)
    assert content_digest(open_checkpoint(tmp_path / "back")) == content_digest(open_checkpoint(tmp_path / "hf"))

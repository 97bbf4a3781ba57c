"""What users of the earlier scripts lose days to, one test for each: fifteen complaints that must not come back.

Each test is the complaint at its shortest; the cases around it are tested where the code is.
"""

import json
import shutil
import tracemalloc

import psutil
import pytest
import tiny
import tiny_lora
from click.testing import CliRunner

from cnq import chat, files, prompts
from cnq.adapters import merge, read_adapter
from cnq.checkpoint import open_checkpoint
from cnq.checkpoint.digest import content_digest
from cnq.cli import cli
from cnq.convert import convert
from cnq.engine import model as engine
from cnq.errors import CheckpointError, NoSpace, PromptError, UnsupportedVocab, VocabMismatch
from cnq.gguf_file import GgufFile
from cnq.ollama import write_modelfile
from cnq.quantize import quantize

N_ODD = 421  # tokens: divided by neither 2 nor 256, as 49953 is not


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A checkpoint with one token more than its tokenizer.model has."""
    folder = tmp_path_factory.mktemp("odd") / "chinese-llama"
    tiny.checkpoint(folder, hidden_size=256, intermediate_size=512, vocab_size=N_ODD)
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": N_ODD - 1}))
    return folder


def test_01_a_merge_that_runs_out_of_memory(tmp_path, monkeypatch):
    """It takes the memory of a few tensors, says how much, and does not begin without."""
    base = tiny.checkpoint(tmp_path / "deep", num_hidden_layers=16)
    lora = tiny_lora.adapter(tmp_path / "lora", base, targets=tiny_lora.ALL)
    merging = merge(open_checkpoint(base), [read_adapter(lora)])
    entries = merging.checkpoint.entries
    for name in entries:
        merging.checkpoint.read(name)  # libraries are loaded, files mapped
    tracemalloc.start()
    for name in entries:
        merging.checkpoint.read(name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = [entry.nbytes for entry in entries.values()]
    assert peak < 8 * max(sizes) < sum(sizes) / 2
    monkeypatch.setattr(files, "free_memory", lambda: merging.memory - 1)
    with pytest.raises(NoSpace, match="of memory needed"):
        convert(base, tmp_path / "out.gguf", loras=[lora])


def test_02_k_quants_of_a_vocabulary_that_256_does_not_divide(odd, tmp_path):
    f16 = convert(odd, tmp_path / "f16.gguf").path
    found = GgufFile(quantize(f16, tmp_path / "q4.gguf", "Q4_K_M").path)
    assert found.tensors["token_embd.weight"].shape == (N_ODD, 256)
    assert found.tensors["token_embd.weight"].type.name == "Q4_K"
    assert found.tensors["output.weight"].type.name == "Q6_K"


def test_03_a_row_of_the_vocabulary_lost_between_two_shards(odd, tmp_path):
    pytest.importorskip("torch")
    from training.to_meta import write_meta

    before = open_checkpoint(odd)
    after = open_checkpoint(write_meta(before, tmp_path / "pth", shards=2).path)
    assert after.entries["lm_head.weight"].shape == (N_ODD, 256)
    assert content_digest(after) == content_digest(before)


def test_04_the_tokenizer_of_another_model(base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "added_tokens.json").write_text(json.dumps({f"[{id}]": id for id in range(420, 600)}))
    with pytest.raises(VocabMismatch, match="the tokenizer has 600 tokens, the embedding 420 rows"):
        convert(tmp_path / "model", tmp_path / "out.gguf")


@pytest.mark.parametrize("said", [-1, 32000])
def test_05_a_vocab_size_that_is_wrong(tmp_path, said):
    """The rows of the embedding count."""
    model = tiny.checkpoint(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": said}))
    converted = convert(model, tmp_path / "out.gguf")
    assert converted.n_vocab == 420
    assert any("the embedding has 420 rows" in note for note in converted.notes)


def test_06_a_digest_that_changes_with_the_file_it_is_saved_in(base, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    shutil.copytree(base, tmp_path / "again", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(base / "model.safetensors"), tmp_path / "again" / "pytorch_model.bin")
    assert content_digest(open_checkpoint(tmp_path / "again")) == content_digest(open_checkpoint(base))


def test_07_an_adapter_of_443_bytes(tmp_path):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}))
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="holds no tensors: training saved an empty adapter"):
        read_adapter(folder)


def test_08_a_merge_that_changes_nothing(base, tmp_path):
    lora = tiny_lora.adapter(tmp_path / "lora", base, size=0)
    with pytest.raises(CheckpointError, match="all zeros, as before training: the adapter changes nothing"):
        read_adapter(lora)


def test_09_adapters_in_the_wrong_order(base, tmp_path):
    """Chinese-LLaMA-Plus has 49953 rows, Chinese-Alpaca-Plus 49954: the other way round a row would be lost."""
    llama = tiny_lora.adapter(tmp_path / "llama-plus", base, rows=430)
    alpaca = tiny_lora.adapter(tmp_path / "alpaca-plus", base, rows=431)
    right = merge(open_checkpoint(base), [read_adapter(llama), read_adapter(alpaca)]).checkpoint
    assert right.config["vocab_size"] == 431
    assert [a["name"] for a in right.origin.planned["adapters"]] == ["llama-plus", "alpaca-plus"]
    with pytest.raises(CheckpointError, match=r"the order is wrong.* Give llama-plus before alpaca-plus"):
        merge(open_checkpoint(base), [read_adapter(alpaca), read_adapter(llama)])


@pytest.mark.parametrize("layout", ["one file", "shards", "bin", "adapter without a config"])
def test_10_a_layout_that_is_not_found(base, tmp_path, layout):
    if layout == "adapter without a config":
        lora = tiny_lora.adapter(tmp_path / "lora", base)
        (lora / "adapter_config.json").unlink()
        with pytest.raises(CheckpointError, match="--lora-alpha A --lora-rank R"):
            read_adapter(lora)
        assert read_adapter(lora, alpha=16, rank=8).low_rank
        return
    model = tiny.checkpoint(tmp_path / "model", shards=2 if layout == "shards" else 1)
    if layout == "bin":
        torch = pytest.importorskip("torch")
        from safetensors.torch import load_file

        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
    assert content_digest(open_checkpoint(model)) == content_digest(open_checkpoint(base))


def test_11_ollama_does_not_stop(gguf, tmp_path):
    path = gguf(vocab="spm-added")
    text = write_modelfile(path, tmp_path / "Modelfile").path.read_text(encoding="utf-8")
    assert f"FROM {path.resolve()}\n" in text  # also from another folder
    assert "PARAMETER stop <|im_end|>\n" in text


def test_12_llama_3_without_its_pre_tokenizer(tmp_path):
    model = tiny.checkpoint(tmp_path / "model", vocab="llama-bpe")
    assert GgufFile(convert(model, tmp_path / "out.gguf").path).fields["tokenizer.ggml.pre"] == "llama-bpe"
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedVocab, match=r"no counterpart in llama\.cpp"):
        convert(model, tmp_path / "other.gguf")


def test_13_half_a_character():
    """Whatever bytes a token has, text comes in whole characters."""
    text = "量化：😀，e\u0301。"
    raw = text.encode()
    for size in (1, 2, 3, 5):
        pieces = list(chat.characters(raw[i : i + size] for i in range(0, len(raw), size)))
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)


def test_14_a_prompt_of_another_form_than_in_training(gguf):
    """The GGUF's own template is used; without one the format has to be named."""
    path = gguf(vocab="spm-added")
    fields = GgufFile(path).fields
    assert chat.style_of(fields, path, None).jinja == fields["tokenizer.chat_template"] == tiny.CHATML
    bare = gguf(vocab="spm")
    with pytest.raises(PromptError, match="--format alpaca"):
        chat.style_of(GgufFile(bare).fields, bare, None)
    assert prompts.FORMATS["alpaca"].stop == ("### Instruction:",)


def test_15_where_to_quantize_how_much_memory_how_many_threads():
    """A plain desktop: the command says what fits, and a model gets as many threads as there are cores, not hyper-threads."""
    models = json.loads(CliRunner().invoke(cli, ["models", "--json"]).stdout)
    assert all(m["params"] for m in models)
    table = CliRunner().invoke(cli, ["models"]).stdout
    assert "RAM" in table
    assert "7b" in table
    assert engine.physical_cores() == (psutil.cpu_count(logical=False) or psutil.cpu_count())

"""Bad input, at the command line: one line that says what was found, expected and to do, exit code 1, nothing left behind."""

import base64
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sentencepiece
import tiny
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from cnq import convert as converting
from cnq.cli import cli
from cnq.errors import CnqError, GgufError
from cnq.gguf_file import GgufFile
from cnq.imatrix_file import read_imatrix
from cnq.inspection import inspect

Spoil = Callable[[Path], object]


# The door


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args])


def tree(place: Path) -> set[Path]:
    return set(place.rglob("*"))


def refused(place: Path, *args: object, saying: tuple[str, ...]) -> str:
    """Run a command that must fail as promised; returns its message."""
    before = tree(place)
    result = run(*args)
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    return checked(place, before, result.stderr, saying)


def checked(place: Path, before: set[Path], stderr: str, saying: tuple[str, ...]) -> str:
    *steps, message = stderr.splitlines()
    assert set(steps) <= {"converting", "quantizing", "restoring", "calibrating", "measuring"}, stderr
    assert message.startswith("Error: ")
    assert len(message) < 800, message
    for word in saying:
        assert word in message, f"{word!r} is not in: {message}"
    assert tree(place) == before
    return message


def process(place: Path, *args: object, **options: Any) -> subprocess.Popen:
    """`python -m cnq` in a session, and with a temporary directory, of its own."""
    env = os.environ | {"TMPDIR": str(place / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "cnq", *map(str, args)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True,
        **options,
    )  # fmt: skip


def process_refused(place: Path, *args: object, saying: tuple[str, ...], **options: Any) -> str:
    before = tree(place)
    child = process(place, *args, **options)
    stdout, stderr = child.communicate()
    assert (child.returncode, stdout) == (1, ""), stderr
    return checked(place, before, stderr, saying)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Temporary directories are made where `tree` sees them."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Callable[..., Path]:
    """originals(**arguments of tiny.checkpoint) -> a sound checkpoint, not to be changed."""
    made: dict[str, Path] = {}

    def make(**settings) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = tiny.checkpoint(tmp_path_factory.mktemp("original") / "model", **settings)
        return made[key]

    return make


@pytest.fixture
def model(originals, tmp_path) -> Callable[..., Path]:
    """model(**arguments of tiny.checkpoint) -> a checkpoint to be spoilt."""

    def copy(**settings) -> Path:
        shutil.copytree(originals(**settings), tmp_path / "model")
        return tmp_path / "model"

    return copy


def not_converted(model: Path, *options: str, saying: tuple[str, ...]) -> str:
    return refused(model.parent, "convert", model, model.parent / "out.gguf", *options, saying=saying)


def edited(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# Directories


def cut(n: int) -> Spoil:
    return lambda model: os.truncate(model / "model.safetensors", n)


def config(**changes: Any) -> Spoil:
    return lambda model: edited(model / "config.json", **changes)


def written(name: str, text: str) -> Spoil:
    return lambda model: (model / name).write_text(text)


def without(*names: str) -> Spoil:
    return lambda model: [(model / name).unlink() for name in names]


def adapter(model: Path) -> None:
    (model / "config.json").rename(model / "adapter_config.json")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "hfl/base", "peft_type": "LORA"}')


DIRECTORIES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "empty": (lambda m: (shutil.rmtree(m), m.mkdir()), ("has no config.json (it holds nothing)", "complete model")),
    "gone": (shutil.rmtree, ("is no directory", "Give a model directory")),
    "lora": (adapter, ("LoRA adapter", "python -m training.merge_lora hfl/base", "OUT")),
    "no config": (without("config.json"), ("has no config.json", "it holds model.safetensors", "complete model")),
    "no weights": (without("model.safetensors"), ("has no weights", "model.safetensors", "it holds config.json")),
    "config: no JSON": (written("config.json", "{"), ("config.json cannot be read as JSON", "Download it again")),
    "config: no text": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe{}"), ("config.json cannot be read as JSON",)),
    "config: too deep": (written("config.json", "[" * 100_000), ("config.json cannot be read as JSON",)),
    "config: list": (written("config.json", "[]"), ("config.json holds a list", "expected an object")),
    "config: empty": (written("config.json", "{}"), ("config.json", "LlamaForCausalLM", "Qwen2ForCausalLM")),
    "unknown family": (config(architectures=["MambaForCausalLM"]), ("MambaForCausalLM", "LlamaForCausalLM")),
    "family: number": (config(architectures=7), ("architectures", "7")),
    "unknown activation": (config(hidden_act="gelu"), ("hidden_act = 'gelu'", "'silu'")),
    "no hidden size": (config(hidden_size=None), ("hidden_size is None", "expected a whole number")),
    "no layers": (config(num_hidden_layers=None), ("num_hidden_layers is None",)),
    "no heads": (config(num_attention_heads=0), ("num_attention_heads is 0",)),
    "no epsilon": (config(rms_norm_eps=None), ("rms_norm_eps is None",)),
    "epsilon: not a number": (config(rms_norm_eps=float("nan")), ("rms_norm_eps is nan",)),
    "size: text": (config(intermediate_size="96"), ("intermediate_size is '96'",)),
    "size: fraction": (config(num_hidden_layers=2.5), ("num_hidden_layers is 2.5",)),
    "size: infinite": (config(hidden_size=float("inf")), ("hidden_size is inf",)),
    "a billion layers": (config(num_hidden_layers=10**9), ("num_hidden_layers is 1000000000", "512")),
    "heads: text": (config(num_key_value_heads="two"), ("num_key_value_heads is 'two'",)),
    "heads: uneven": (config(num_attention_heads=3, num_key_value_heads=3), ("num_attention_heads is 3", "hidden_size")),
    "heads: more": (config(num_attention_heads=8), ("k_proj.weight", "by config.json it should be")),
    "rope: nonsense": (config(rope_scaling={"type": "spiral"}), ("spiral", "yarn")),
    "rope: text": (config(rope_scaling="linear"), ("rope_scaling", "linear")),
    "rope: no factor": (config(rope_scaling={"type": "linear"}), ("factor",)),
    "rope: theta": (config(rope_theta="big"), ("rope_theta",)),
    "GPTQ": (config(quantization_config={"quant_method": "gptq"}), ("quantized already (gptq)", "float checkpoint")),
    "quantized somehow": (config(quantization_config=True), ("quantized already", "float checkpoint")),
    "weights: 0 bytes": (cut(0), ("model.safetensors is damaged or cut short", "Download it again")),
    "weights: 4 bytes": (cut(4), ("model.safetensors is damaged or cut short",)),
    "weights: 8 bytes": (cut(8), ("model.safetensors is damaged or cut short",)),
    "weights: half a header": (cut(700), ("model.safetensors is damaged or cut short",)),
    "weights: half": (cut(100_000), ("model.safetensors is damaged or cut short",)),
    "weights: huge header": (
        lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64),
        ("model.safetensors is damaged or cut short",),
    ),
    "weights: text": (written("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), ("Download it again",)),
    "no tokenizer": (without("tokenizer.model"), ("neither tokenizer.model nor tokenizer.json", "own repository")),
    "tokenizer: no JSON": (written("tokenizer.json", "<html>"), ("tokenizer.json cannot be read as JSON",)),
    "tokenizer_config: list": (written("tokenizer_config.json", "[]"), ("tokenizer_config.json holds a list",)),
    "tokenizer: nothing": (written("tokenizer.model", ""), ("is no SentencePiece model", "tokenizer.json")),
}  # fmt: skip


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_directory_that_is_no_model(case, model):
    spoil, saying = DIRECTORIES[case]
    spoil(folder := model())
    not_converted(folder, saying=saying)


def test_last_byte_missing(model):
    weights = model() / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    not_converted(weights.parent, saying=("model.safetensors is damaged or cut short",))


@pytest.mark.parametrize("shards", [2, 3])
def test_a_shard_is_missing(model, shards):
    folder = model(shards=shards)
    (folder / f"model-00002-of-0000{shards}.safetensors").unlink()
    not_converted(folder, saying=(f"1 of {shards} shards are missing: model-00002-of-0000{shards}.safetensors", "Finish"))


@pytest.mark.parametrize("name", ["../model/stolen.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 7, None, ["a"]])
def test_an_index_leads_outside(model, name):
    folder = model(shards=2)
    (folder / "stolen.safetensors").write_bytes(b"")
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    edited(index, weight_map=files | {"lm_head.weight": name})
    not_converted(folder, saying=("model.safetensors.index.json names a file outside", repr(name), "Do not use this download"))


def test_an_index_lists_what_its_shards_lack(model):
    folder = model(shards=2)
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    edited(index, weight_map=files | {"model.extra.weight": "model-00001-of-00002.safetensors"})
    not_converted(folder, saying=("lack: model.extra.weight", "Download model-00001-of-00002.safetensors again"))


@pytest.mark.parametrize("files", [{}, [], "x", None])
def test_an_index_without_a_map(model, files):
    folder = model(shards=2)
    edited(folder / "model.safetensors.index.json", weight_map=files)
    not_converted(folder, saying=("has no weight_map", "Download it again"))


def test_a_tensor_in_two_shards(model):
    folder = model(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-other.safetensors")
    not_converted(folder, saying=("in more than one shard: ", "Remove the files of the other download"))


def test_a_damaged_model_card_does_not_stop_a_conversion(model):
    folder = model()
    (folder / "README.md").write_bytes(b"---\nlicense: [\n: }\n\xff---\n")
    (folder / "generation_config.json").write_text("[]")
    result = run("convert", folder, folder.parent / "out.gguf")
    assert result.exit_code == 0, result.exc_info
    assert "note: README.md" in result.stderr


def test_the_folder_one_is_in(model, monkeypatch):
    monkeypatch.chdir(model())
    assert run("convert", ".", "../out.gguf").exit_code == 0
    assert GgufFile(Path("../out.gguf")).fields["general.name"] == "Model"


# Tokenizers


def test_a_unigram_model(model):
    folder = model()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.SENTENCES), model_prefix=str(folder / "tokenizer"), model_type="unigram", vocab_size=250,
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    not_converted(folder, saying=("UNIGRAM", "split text differently", "python -m training.merge_tokenizer"))


@pytest.mark.parametrize(
    ("ids", "saying"),
    [
        (range(200), ("has no token for the bytes 200, 201", "Download it again")),
        ([*range(255), 0], ("256 lines with 256 tokens and 255 ranks, expected each once",)),
        (range(1, 257), ("expected each once, from 0 on",)),
        (range(256), ("512 tokens, the embedding 420 rows",)),
        ([*range(255), "x"], ("the tokenizer's files are not in order",)),
    ],
)
def test_ranks_that_are_not_those_of_llama_3(model, ids, saying):
    folder = model()
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {id}\n" for byte, id in enumerate(ids)]
    (folder / "tokenizer.model").write_text("".join(lines))
    not_converted(folder, saying=saying)


@pytest.mark.parametrize("vocab", ["spm", "spm-json", "llama-bpe"])
def test_more_tokens_than_rows(model, vocab):
    if vocab == "llama-bpe":
        pytest.importorskip("tokenizers")
    folder = model(vocab=vocab)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tiny.weights(folder, json.loads((folder / "config.json").read_text()) | {"vocab_size": size - 20}, "F16")
    not_converted(
        folder,
        saying=(
            f"{size} tokens, the embedding {size - 20} rows",
            "LoRA",
            "training.merge_lora",
            "tokenizer is another model's",
        ),
    )


def test_far_fewer_tokens_than_rows(model):
    folder = model()
    tiny.weights(folder, json.loads((folder / "config.json").read_text()) | {"vocab_size": 512}, "F16")
    not_converted(folder, saying=("420 tokens, the embedding 512 rows", "tokenizer is another model's", "with 512 tokens"))


def test_text_is_cut_in_a_way_llama_cpp_does_not_know(model):
    pytest.importorskip("tokenizers")
    folder = model(vocab="qwen2")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(r"\\p{N}", r"\\p{N}{7}"))
    not_converted(folder, saying=("no pre-tokenizer that cuts by", r"\\p{N}{7}", "qwen2", "not converted"))


def test_a_token_with_two_ids(model):
    """llama.cpp would abort at the GGUF."""
    folder = model(vocab="spm-added")
    config = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    config["423"]["content"] = "[PAD]"
    edited(folder / "tokenizer_config.json", added_tokens_decoder=config)
    not_converted(folder, saying=("several ids for one token ('[PAD]')", "own repository"))


def test_a_tokenizer_json_of_another_kind(model):
    folder = model(vocab="spm-json")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    edited(folder / "tokenizer.json", model=tokenizer["model"] | {"type": "WordPiece"})
    not_converted(folder, saying=("WordPiece", "BPE"))


# Tensors


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def random_tensors(folder: Path) -> dict[str, np.ndarray]:
    """What the checkpoint holds, in float32."""
    settings = json.loads((folder / "config.json").read_text())
    return {name: tiny.values(name, shape) for name, shape in tiny.of_config(settings).expected(settings).items()}


def test_a_tokenizer_in_mistrals_own_form(model):
    folder = model(family="mistral")
    (folder / "tokenizer.model").rename(folder / "tekken.json")
    not_converted(folder, saying=("neither tokenizer.model nor tokenizer.json", "tekken.json is Mistral's own form"))


# What a family asks of its config.json: settings of tiny.checkpoint, changes to the config, what is said

PER_FAMILY: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "more experts chosen than there are": (
        {"family": "mixtral"}, {"num_experts_per_tok": 5},
        ("num_experts_per_tok is 5, expected no more than num_local_experts, which is 4",),
    ),
    "no experts": ({"family": "mixtral"}, {"num_local_experts": 0}, ("num_local_experts is 0, expected a whole number",)),
    "experts in words": ({"family": "mixtral"}, {"num_local_experts": "eight"}, ("num_local_experts is 'eight'",)),
    "a million experts": ({"family": "mixtral"}, {"num_local_experts": 10**6}, ("num_local_experts is 1000000", "1024")),
    "none chosen": ({"family": "mixtral"}, {"num_experts_per_tok": 0}, ("num_experts_per_tok is 0",)),
    "fewer experts said": (
        {"family": "mixtral"}, {"num_local_experts": 3},
        ("MixtralForCausalLM does not have: model.layers.0.block_sparse_moe.experts.3.w1.weight",),
    ),
    "more experts said": (
        {"family": "mixtral"}, {"num_local_experts": None},
        ("24 of 65 tensors are missing: model.layers.0.block_sparse_moe.experts.4.w1.weight",),
    ),
    "window in words": ({"family": "mistral"}, {"sliding_window": "long"}, ("sliding_window is 'long'",)),
    "heads do not divide": (
        {}, {"num_key_value_heads": 3}, ("num_key_value_heads is 3, expected a divisor of num_attention_heads, which is 4",),
    ),
    "odd heads": ({}, {"head_dim": 15}, ("head_dim is 15, expected an even number",)),
    "qwen3: window": ({"family": "qwen3"}, {"use_sliding_window": True}, ("use_sliding_window = True", "False only")),
    "qwen3: biases": ({"family": "qwen3"}, {"attention_bias": True}, ("attention_bias = True", "False only")),
    "qwen3: factors": (
        {"family": "qwen3"}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ("rope scaling 'llama3'; cnq converts Qwen3ForCausalLM with default, dynamic, linear, yarn",),
    ),
    "internlm2: biases": ({"family": "internlm2"}, {"bias": True}, ("InternLM2ForCausalLM with bias = True", "False only")),
    "internlm2: tied": ({"family": "internlm2"}, {"tie_word_embeddings": True}, ("tie_word_embeddings = True",)),
    "internlm2: other groups": (
        {"family": "internlm2"}, {"num_key_value_heads": 4},
        ("attention.wqkv.weight is (128, 64), by config.json it should be (192, 64)",),
    ),
    "baichuan: layers": (
        {"family": "baichuan-7b"}, {"num_hidden_layers": 28},
        ("BaichuanForCausalLM with num_hidden_layers = 28; cnq describes 32 or 40 only", "rotary attention from ALiBi"),
    ),
    "baichuan: tied": ({"family": "baichuan-7b"}, {"tie_word_embeddings": True}, ("tie_word_embeddings = True",)),
    "the first InternLM": ({}, {"architectures": ["InternLMForCausalLM"]}, ("InternLMForCausalLM", "InternLM2ForCausalLM")),
    "Qwen3 with experts": ({}, {"architectures": ["Qwen3MoeForCausalLM"]}, ("Qwen3MoeForCausalLM", "Qwen3ForCausalLM")),
}  # fmt: skip


@pytest.mark.parametrize("case", PER_FAMILY)
def test_a_config_that_its_family_cannot_have(case, model):
    settings, changes, saying = PER_FAMILY[case]
    folder = model(**settings)
    edited(folder / "config.json", **changes)
    not_converted(folder, saying=saying)


PACKED = "model.layers.3.self_attn.W_pack.weight"
OUT_OF_SHAPE: dict[str, tuple[str, str, tuple[int, ...] | None, tuple[str, ...]]] = {
    "expert missing": (
        "mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight", None,
        ("1 of 41 tensors are missing: model.layers.1.block_sparse_moe.experts.2.w3.weight", "download is incomplete"),
    ),
    "expert of another shape": (
        "mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.weight", (96, 64), ("w2.weight is (96, 64)", "(64, 96)"),
    ),
    "router": (
        "mixtral", "model.layers.0.block_sparse_moe.gate.weight", (8, 64), ("gate.weight is (8, 64)", "(4, 64)"),
    ),
    "W_pack with fewer rows": ("baichuan-7b", PACKED, (128, 64), (f"{PACKED} is (128, 64), by config.json", "(192, 64)")),
    "W_pack turned": ("baichuan-7b", PACKED, (64, 192), (f"{PACKED} is (64, 192)", "(192, 64)")),
    "W_pack in three": ("baichuan-7b", PACKED, (3, 64, 64), (f"{PACKED} is (3, 64, 64)", "(192, 64)")),
    "W_pack missing": ("baichuan-7b", PACKED, None, (f"1 of 227 tensors are missing: {PACKED}",)),
    "no embedding": ("internlm2", "model.tok_embeddings.weight", None, ("model.tok_embeddings.weight is missing among",)),
}  # fmt: skip


@pytest.mark.parametrize("case", OUT_OF_SHAPE)
def test_tensors_that_do_not_fit_their_family(case, model):
    from safetensors.numpy import save_file

    family, name, shape, saying = OUT_OF_SHAPE[case]
    folder = model(family=family)
    tensors = tensors_of(folder)
    del tensors[name]
    if shape:
        tensors[name] = np.zeros(shape, np.float16)
    save_file(tensors, folder / "model.safetensors")
    not_converted(folder, saying=saying)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_in_a_row_to_be_divided(model, value):
    folder = model(family="baichuan2-7b")
    tensors = random_tensors(folder)
    tensors["lm_head.weight"][70, 5] = value
    tiny.save(folder / "model.safetensors", tensors, "F32")
    not_converted(folder, saying=("lm_head.weight", f"{value} at row 70, column 5", "damaged"))


Q = "model.layers.1.self_attn.q_proj.weight"


def change(tensors: dict[str, np.ndarray], case: str) -> None:
    match case:
        case "missing":
            del tensors[Q]
        case "unknown":
            tensors["model.layers.0.moe.gate.weight"] = np.zeros((2, 2), np.float16)
        case "shape":
            tensors[Q] = tensors[Q][:32]
        case "no embedding":
            del tensors["model.embed_tokens.weight"]
        case "scalar embedding":
            tensors["model.embed_tokens.weight"] = np.zeros((), np.float16)
        case "empty embedding":
            tensors["model.embed_tokens.weight"] = np.zeros((0, 64), np.float16)
        case "integers":
            tensors[Q] = np.zeros((64, 64), np.int8)


@pytest.mark.parametrize(
    ("case", "saying"),
    {
        "missing": (f"1 of 21 tensors are missing: {Q}", "download is incomplete"),
        "unknown": ("LlamaForCausalLM does not have: model.layers.0.moe.gate.weight", "variant"),
        "shape": (f"{Q} is (32, 64), by config.json it should be (64, 64)", "different models"),
        "no embedding": ("model.embed_tokens.weight is missing among 20 tensors", "download is incomplete"),
        "scalar embedding": ("model.embed_tokens.weight is ()",),
        "empty embedding": ("model.embed_tokens.weight is (0, 64)",),
        "integers": (f"{Q} is I8, expected F32, F16 or BF16", "float checkpoint"),
    }.items(),
)
def test_tensors_that_do_not_fit(model, case, saying):
    from safetensors.numpy import save_file

    folder = model()
    tensors = tensors_of(folder)
    change(tensors, case)
    save_file(tensors, folder / "model.safetensors")
    not_converted(folder, saying=saying)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_value_that_is_not_finite(model, dtype, value, name):
    folder = model()
    tensors = random_tensors(folder)
    row = 70 if tensors[name].ndim > 1 else 0
    tensors[name].reshape(-1, 64)[row, 5] = value
    tiny.save(folder / "model.safetensors", tensors, dtype)
    for option in ("auto", "q8_0", "f32"):
        not_converted(
            folder, "--dtype", option, saying=(name, f"{value} at row {row}, column 5", "damaged", "download it again")
        )


@pytest.mark.parametrize(
    ("dtype", "value", "asked", "saying", "advice"),
    [
        ("BF16", 131072, "f16", ("131072 is too large for F16", "65520"), "bf16"),
        ("F32", 65520, "f16", ("65520 is too large for F16",), "bf16"),
        ("F32", -1e9, "q8_0", ("1e+09 is too large for Q8_0",), "bf16"),
        ("F32", 3.4e38, "bf16", ("3.4e+38 is too large for BF16",), "f32"),
    ],
)
def test_a_value_too_large(model, dtype, value, asked, saying, advice):
    """Just too large, and what the message advises works."""
    folder = model()
    tensors = random_tensors(folder)
    tensors["lm_head.weight"][3, 4] = value
    tiny.save(folder / "model.safetensors", tensors, dtype)
    not_converted(folder, "--dtype", asked, saying=("lm_head.weight", *saying, f"--dtype {advice}"))
    result = run("convert", folder, folder.parent / "out.gguf", "--dtype", advice)
    assert result.exit_code == 0, result.output
    assert np.isfinite(GgufFile(folder.parent / "out.gguf").tensor("output.weight").float32()).all()


def test_the_largest_values_that_fit(model):
    folder = model()
    tensors = random_tensors(folder)
    for asked, value in (("f16", 65519), ("q8_0", 8.3e6), ("bf16", 3.39e38)):
        tensors["lm_head.weight"][3, 4] = value
        tiny.save(folder / "model.safetensors", tensors, "F32")
        result = run("convert", folder, folder.parent / "out.gguf", "--dtype", asked, "--force")
        assert result.exit_code == 0, result.output
        assert np.isfinite(GgufFile(folder.parent / "out.gguf").tensor("output.weight").float32()).all()


# Weights pickled by torch


def pickled(folder: Path, case: str) -> None:
    """Replace the safetensors of a checkpoint by .bin files."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    state = load_torch(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    first = {name: state[name] for name in names[:7]}
    match case:
        case "sharded":
            files = {"pytorch_model-00001-of-00002.bin": first}
            files["pytorch_model-00002-of-00002.bin"] = {name: state[name] for name in names[7:]}
            index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
            for file, part in files.items():
                torch.save(part, folder / file)
        case "old":
            torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        case "views":  # parameters, transposed in memory, and two that share one storage
            both = torch.cat([state[name].flatten() for name in names[:2]])
            cut = state[names[0]].numel()
            shared = {names[0]: both[:cut], names[1]: both[cut:]}
            state |= {name: part.view(state[name].shape) for name, part in shared.items()}
            state[Q] = torch.nn.Parameter(state[Q].T.contiguous().T)
            torch.save(state, folder / "pytorch_model.bin")
        case _:
            torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("case", "dtype"), [("one", "F16"), ("one", "BF16"), ("one", "F32"), ("sharded", "F16"), ("old", "BF16"), ("views", "F16")]
)
def test_bin_files_hold_the_same_tensors(model, originals, tmp_path, case, dtype):
    pickled(folder := model(dtype=dtype), case)
    for source, out in ((folder, "bin.gguf"), (originals(dtype=dtype), "safetensors.gguf")):
        result = run("convert", source, tmp_path / out)
        assert result.exit_code == 0, result.output
    got, want = GgufFile(tmp_path / "bin.gguf"), GgufFile(tmp_path / "safetensors.gguf")
    assert got.fields == want.fields
    assert got.tensors.keys() == want.tensors.keys()
    for name, info in want.tensors.items():
        assert got.tensors[name].type == info.type
        assert got.tensor(name).data.tobytes() == want.tensor(name).data.tobytes(), name


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(model, tmp_path, zipped):
    pickled(folder := model(), "one")
    import torch

    weights = {"lm_head.weight": Malicious(tmp_path / "tmp" / "owned")}
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    message = not_converted(folder, saying=("pytorch_model.bin is damaged, or not plain weights", "io.open"))
    assert "weights_only" not in message  # torch's advice, to switch the protection off
    assert not (tmp_path / "tmp" / "owned").exists()


@pytest.mark.parametrize("case", ["empty", "half", "text", "list", "nested", "numbered", "sparse", "stretched"])
def test_a_bin_file_that_is_no_weights(model, case):
    pickled(folder := model(), "one")
    import torch

    path = folder / "pytorch_model.bin"
    match case:
        case "empty":
            path.write_bytes(b"")
        case "half":
            os.truncate(path, path.stat().st_size // 2)
        case "text":
            path.write_text("version https://git-lfs.github.com/spec/v1\n")
        case "list":
            torch.save([1, 2], path)
        case "nested":
            torch.save({"model": {"lm_head.weight": torch.zeros(1)}}, path)
        case "numbered":
            torch.save({7: torch.zeros(1)}, path)
        case "sparse":
            torch.save({"lm_head.weight": torch.eye(3).to_sparse()}, path)
        case "stretched":  # a million million rows in the memory of one
            torch.save({"model.embed_tokens.weight": torch.zeros(1, 64).expand(10**12, 64)}, path)
    not_converted(folder, saying=("pytorch_model.bin is", "not plain weights"))


def test_bin_files_without_torch(model):
    folder = model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    code = "import sys; sys.modules['torch'] = None; from cnq.cli import cli; cli(sys.argv[1:])"
    before = tree(folder.parent)
    result = subprocess.run(
        [sys.executable, "-c", code, "convert", folder, folder.parent / "out.gguf"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (1, "")
    checked(folder.parent, before, result.stderr, ("takes torch to read", "pip install 'cnq[training]'", "safetensors"))


# Outputs


def commands(originals, gguf, dst: Path) -> dict[str, tuple[object, ...]]:
    """The commands that write a model, to `dst`."""
    return {
        "convert": ("convert", originals(), dst),
        "to-hf": ("to-hf", gguf(), dst),
        "quantize": ("quantize", gguf(), dst, "-t", "Q8_0"),
    }


@pytest.mark.parametrize("command", ["convert", "to-hf", "quantize"])
def test_an_output_that_is_there(originals, gguf, tmp_path, command):
    dst = tmp_path / "out"
    dst.mkdir() if command == "to-hf" else dst.write_text("precious")
    args = commands(originals, gguf, dst)[command]
    refused(tmp_path, *args, saying=("out exists", "--force", "another output"))
    assert command == "to-hf" or dst.read_text() == "precious"
    assert run(*args, "--force").exit_code == 0
    assert tree(tmp_path) - tree(dst) == {dst, tmp_path / "tmp"}


@pytest.mark.parametrize("command", ["convert", "to-hf", "quantize"])
@pytest.mark.parametrize(
    ("where", "saying"),
    {
        "file/out": ("file/out cannot be written", "Name an output in a folder you may write to"),
        "file/sub/out": ("file/sub/out cannot be written",),
        "/proc/out": ("/proc/out cannot be written",),
        "/proc/sub/out": ("/proc/sub/out cannot be written",),
        "n" * 300: ("cannot be written: File name too long",),
        "new/" + "n" * 300: ("cannot be written: File name too long",),
    }.items(),
)
def test_an_output_that_cannot_be(originals, gguf, tmp_path, command, where, saying):
    (tmp_path / "file").write_text("")
    refused(tmp_path, *commands(originals, gguf, tmp_path / where)[command], saying=saying)


@pytest.mark.parametrize("command", ["convert", "quantize"])
@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("name", ["folder", "."])
def test_a_file_does_not_replace_a_folder(originals, gguf, tmp_path, command, force, name, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("")
    monkeypatch.chdir(tmp_path / "folder")
    dst = tmp_path / "folder" if name == "folder" else Path()
    refused(tmp_path, *commands(originals, gguf, dst)[command], *force, saying=("is a folder", "Name the file"))


def test_to_hf_replaces_checkpoints_only(originals, gguf, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    refused(tmp_path, "to-hf", gguf(), folder, "--force", saying=("is a folder with other things in it", "another output"))
    shutil.copytree(originals(), folder / "model")
    shutil.copy(gguf(), folder / "model" / "model.gguf")
    refused(tmp_path, "to-hf", folder / "model" / "model.gguf", folder / "model", "--force", saying=("other things",))


@pytest.mark.parametrize("command", ["convert", "to-hf", "quantize"])
def test_no_room_is_said_beforehand(originals, gguf, tmp_path, command, monkeypatch):
    monkeypatch.setattr("cnq.files.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    args = commands(originals, gguf, tmp_path / "new" / "out")[command]
    refused(tmp_path, *args, saying=("needed, 1.0 kB free", "Make room", "another disk"))


@pytest.mark.parametrize("command", ["convert", "to-hf", "quantize"])
@pytest.mark.parametrize(
    "room", [lambda size: size // 10, lambda size: size // 2, lambda size: size - 1], ids=["tenth", "half", "byte"]
)
def test_the_disk_fills_up(originals, gguf, tmp_path, command, room):
    """A limit on the size of files stands for a full disk: writes fail in the same places."""
    dst = tmp_path / "new" / "out"
    args = commands(originals, gguf, dst)[command]
    assert run(*args).exit_code == 0
    limit = room(max(f.stat().st_size for f in [dst, *dst.rglob("*")] if f.is_file()))
    shutil.rmtree(dst.parent)
    process_refused(
        tmp_path, *args, saying=("out cannot be written", "File too large", "Make room"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("command", ["convert", "to-hf", "quantize"])
def test_a_small_disk(originals, gguf, tmp_path, command, monkeypatch):
    with small_disk(tmp_path / "disk", 65536) as disk:
        args = commands(originals, gguf, disk / "new" / "out")[command]
        refused(tmp_path, *args, saying=("needed, 65.5 kB free", "Make room"))
        monkeypatch.setattr("cnq.files.require_space", lambda folder, need: None)  # others may fill a disk meanwhile
        refused(tmp_path, *args, saying=("out cannot be written: No space left on device", "Make room"))


# Ctrl-C and kill -9


@pytest.fixture(scope="session")
def large(tmp_path_factory, originals) -> dict[str, tuple[object, ...]]:
    """Commands, without their output, that take long enough to have a middle."""
    folder = tmp_path_factory.mktemp("large")
    settings = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3}
    checkpoint = tiny.checkpoint(folder / "hf", **settings)
    assert run("convert", checkpoint, folder / "f16.gguf").exit_code == 0
    return {
        "convert": ("convert", checkpoint, "--dtype", "q8_0"),
        "to-hf": ("to-hf", folder / "f16.gguf", "--dtype", "f32"),
        "quantize": ("quantize", folder / "f16.gguf", "-t", "Q3_K_S", "--threads", 1),
    }


def stopped_in_the_middle(place: Path, *args: object) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Start a command that writes place/out, and hold it and its children still once it writes."""
    child = process(place, *args)
    partial = place / "out.partial"
    while not partial.exists() or (partial.is_file() and not partial.stat().st_size):
        assert child.poll() is None, child.communicate()
        time.sleep(0.001)
    os.killpg(child.pid, signal.SIGSTOP)
    if (place / "out").exists():
        os.killpg(child.pid, signal.SIGKILL)
        pytest.fail("it ended before it could be stopped: make the model larger")
    return child, psutil.Process(child.pid).children(recursive=True)


def gone(process: psutil.Process) -> bool:
    """Ended; a zombie has, too, when the machine's first process does not collect orphans."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("command", ["convert", "to-hf", "quantize"])
def test_ctrl_c_leaves_nothing(large, tmp_path, command):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and so their children, ignore it
    name, src, *options = large[command]
    before = tree(tmp_path)
    child, helpers = stopped_in_the_middle(tmp_path, name, src, tmp_path / "out", *options)
    os.killpg(child.pid, signal.SIGINT)
    os.killpg(child.pid, signal.SIGCONT)
    stdout, stderr = child.communicate()
    assert (child.returncode, stdout) == (130, "")
    assert stderr.splitlines()[1:] == ["", "interrupted; nothing half-made was left behind"]
    assert tree(tmp_path) == before
    assert len(helpers) == (command == "quantize")
    assert all(gone(p) for p in helpers)


@pytest.mark.parametrize("command", ["convert", "to-hf", "quantize"])
def test_after_kill_9_the_next_run_is_as_any(large, tmp_path, command):
    name, src, *options = large[command]
    child, helpers = stopped_in_the_middle(tmp_path, name, src, tmp_path / "out", *options)
    child.kill()
    child.wait()
    if helpers:
        os.killpg(child.pid, signal.SIGCONT)
    child.communicate()
    assert (tmp_path / "out.partial").exists()
    for args in ((tmp_path / "out",), (tmp_path / "undisturbed",)):
        result = run(name, src, *args, *options)
        assert result.exit_code == 0, result.output
    while not all(gone(p) for p in helpers):  # orphans end by themselves
        time.sleep(0.001)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "undisturbed", "tmp"}
    assert not tree(tmp_path / "tmp")


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in (path, *path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("command", ["convert", "to-hf", "quantize"])
def test_two_at_once(large, originals, gguf, tmp_path, command):
    """The second is told; the first is not disturbed."""
    name, src, *options = large[command]
    child, _ = stopped_in_the_middle(tmp_path, name, src, tmp_path / "out", *options)
    refused(tmp_path, name, src, tmp_path / "out", *options, saying=("is being written by another cnq", "Wait"))
    os.killpg(child.pid, signal.SIGCONT)
    child.communicate()
    assert child.returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", "tmp"}


# GGUFs

STRING, ARRAY, U16, U32, F32_VALUE = 8, 9, 2, 4, 6


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_bytes(
    fields: tuple[tuple[str, int, bytes], ...] = (("general.architecture", STRING, string("llama")),),
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...] = (),
    *,
    n_fields: int | None = None,
    n_tensors: int | None = None,
    version: int = 3,
    magic: bytes = b"GGUF",
) -> bytes:
    """A GGUF of (key, kind, value) and (name, dimensions, type, offset), whatever they claim; a KB of zeros for data."""
    counts = [given if n is None else n for given, n in ((len(tensors), n_tensors), (len(fields), n_fields))]
    head = magic + struct.pack("<IQQ", version, *counts)
    head += b"".join(string(key) + struct.pack("<I", kind) + value for key, kind, value in fields)
    for name, dims, type, offset in tensors:
        head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type, offset)
    return head + bytes(-len(head) % 32 + 1024)


def of_shape(*dims: int, type: int = 0) -> bytes:
    return gguf_bytes(tensors=(("token_embd.weight", dims, type, 0),))


MANY = 2**63
BROKEN_GGUFS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("cannot be read as GGUF: the file is empty",)),
    "magic only": (b"GGUF", ("cut short or damaged", "Download or make it again")),
    "safetensors": (b"\x08\0\0\0\0\0\0\0{}      ", ("is no GGUF file", "it starts with", "expected b'GGUF'")),
    "text": (b"<!DOCTYPE html>\n", ("is no GGUF file", "b'<!DO'")),
    "version 1": (gguf_bytes(version=1), ("GGUF version 1, expected 2 or 3",)),
    "big-endian": (gguf_bytes(version=3 << 24), ("GGUF version 50331648, expected 2 or 3",)),
    "header only": (gguf_bytes()[:24], ("cut short or damaged",)),
    "a key cut": (gguf_bytes()[:30], ("cut short or damaged",)),
    "fields without end": (gguf_bytes(n_fields=MANY), ("appears twice", "Make the file again")),
    "tensors without end": (gguf_bytes(n_tensors=MANY), ("0 dimensions, expected 1 to 4",)),
    "key of any length": (gguf_bytes(n_fields=0, n_tensors=0)[:16] + b"\xff" * 64, ("cut short or damaged",)),
    "string of any length": (
        gguf_bytes((("general.name", STRING, struct.pack("<Q", MANY)),)),
        ("cut short or damaged", "a string of 9223372036854775808 bytes"),
    ),
    "array of any length": (
        gguf_bytes((("x", ARRAY, struct.pack("<IQ", U32, MANY)),)),
        ("an array of 9223372036854775808 items",),
    ),
    "array of strings of any length": (gguf_bytes((("x", ARRAY, struct.pack("<IQ", STRING, MANY)),)), ("an array of",)),
    "array of arrays": (gguf_bytes((("x", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), ("expected numbers or strings",)),
    "array of what": (gguf_bytes((("x", ARRAY, struct.pack("<IQ", 77, 1)),)), ("an array of type 77",)),
    "value of what": (gguf_bytes((("x", 77, b""),)), ("metadata of unknown type 77",)),
    "key that is no text": (gguf_bytes((("x", STRING, string(b"\xff\xfe")),)), ("cut short or damaged",)),
    "key twice": (gguf_bytes((("x", U32, bytes(4)),) * 2), ("x appears twice",)),
    "tensor twice": (gguf_bytes(tensors=(("a", (4,), 0, 0),) * 2), ("a appears twice",)),
    "tensor of what": (of_shape(4, type=77), ("token_embd.weight has unknown type 77", "newer than cnq")),
    "no dimensions": (of_shape(), ("0 dimensions, expected 1 to 4",)),
    "five dimensions": (of_shape(1, 1, 1, 1, 1), ("5 dimensions, expected 1 to 4",)),
    "dimension 0": (of_shape(0, 4), ("token_embd.weight is (4, 0), which holds nothing",)),
    "dimension 0 of any size": (of_shape(MANY, 0), ("which holds nothing",)),
    "product beyond 64 bits": (of_shape(2**32, 2**32, 2**32), ("is cut short", "its tensors need")),
    "rows that fill no block": (of_shape(100, type=12), ("rows of 100", "Q4_K's 256")),
    "offset beyond the file": (gguf_bytes(tensors=(("a", (4,), 0, 2**63),)), ("is cut short", "its tensors need")),
    "alignment 0": (gguf_bytes((("general.alignment", U32, bytes(4)),)), ("general.alignment is 0, expected a power of two",)),
    "alignment text": (gguf_bytes((("general.alignment", STRING, string("32")),)), ("general.alignment is 32",)),
    "alignment huge": (gguf_bytes((("general.alignment", 10, struct.pack("<Q", MANY)),)), ("is cut short",)),
    "no architecture": (gguf_bytes(fields=()), ("has no general.architecture",)),
}  # fmt: skip


def gguf_commands(path: Path) -> Iterator[tuple[object, ...]]:
    yield "inspect", path
    yield "to-hf", path, path.with_name("out")
    yield "convert", path, path.with_name("out")
    yield "quantize", path, path.with_name("out"), "-t", "Q8_0"
    yield "chat", path, "--prompt", "x", "--format", "chatml"
    (text := path.with_name("text.txt")).write_text("".join(tiny.SENTENCES))
    yield "imatrix", path, text, "--output", path.with_name("out")
    yield "evaluate", path, "--text", text
    yield "evaluate", path, "--text", text, "--against", path


@pytest.mark.parametrize("case", BROKEN_GGUFS)
def test_a_file_that_is_no_gguf(tmp_path, case):
    content, saying = BROKEN_GGUFS[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for args in gguf_commands(path):
        if case == "no architecture" and args[0] == "quantize":  # llama.cpp's words
            refused(tmp_path, *args, saying=("model.gguf was not quantized: unknown model architecture",))
        else:
            refused(tmp_path, *args, saying=("model.gguf", *saying))


@pytest.mark.parametrize("name", ["nowhere.gguf", "."])
def test_no_such_gguf(tmp_path, name):
    for args in gguf_commands(tmp_path / name):
        if args[0] not in ("convert", "to-hf"):  # they read directories as well
            refused(tmp_path, args[0], tmp_path / name, *args[2:], saying=("cannot be read as GGUF",))


@pytest.mark.parametrize("left", [0.1, 0.5, 0.9, 0.9999])
def test_a_gguf_cut_short(gguf, tmp_path, left):
    path = tmp_path / "model.gguf"
    shutil.copy(gguf(), path)
    os.truncate(path, int(path.stat().st_size * left))
    for args in gguf_commands(path):
        refused(tmp_path, *args, saying=("model.gguf is cut short", "Download or make it again"))


def altered(src: Path, dst: Path, changes: dict[str, tuple[int, bytes] | None]) -> None:
    """A GGUF with other metadata: key -> (kind, value), None removes it."""
    file = GgufFile(src)
    raw = src.read_bytes()
    values = {key: file.raw(key)[8 + len(key.encode()) + 4 :] for key in file.fields}
    fields = {key: (file.kinds[key], value) for key, value in values.items()}
    at = max(end for _, end in file.spans.values())
    kept = {key: value for key, value in (fields | changes).items() if value is not None}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(file.tensors), len(kept))
    head += b"".join(string(key) + struct.pack("<I", kind) + value for key, (kind, value) in kept.items())
    head += raw[at : file.meta_bytes]
    dst.write_bytes(head + bytes(-len(head) % 32) + raw[file.data_start :])


def u32(n: int) -> tuple[int, bytes]:
    return U32, struct.pack("<I", n)


TEXT, NUMBERS = (STRING, string("seven")), (ARRAY, struct.pack("<IQI", U32, 1, 7))
ODD_METADATA: dict[str, tuple[dict[str, tuple[int, bytes] | None], tuple[str, ...]]] = {
    "another family": ({"general.architecture": (STRING, string("mamba"))}, ("architecture mamba", "cnq knows llama")),
    "no heads": ({"llama.attention.head_count": None}, ("the GGUF has no llama.attention.head_count", "Convert it again")),
    "0 heads": ({"llama.attention.head_count": u32(0)}, ("head_count = 0, expected",)),
    "heads by layer": ({"llama.attention.head_count": NUMBERS}, ("head_count = [7], expected", "variant")),
    "size in words": ({"llama.embedding_length": TEXT}, ("embedding_length = 'seven', expected",)),
    "4 billion layers": ({"llama.block_count": u32(2**32 - 1)}, ("block_count = 4294967295, expected", "512")),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, ("has no llama.attention.layer_norm_rms_epsilon",)),
    "epsilon in words": ({"llama.attention.layer_norm_rms_epsilon": TEXT}, ("rms_epsilon = 'seven'",)),
    "theta": ({"llama.rope.freq_base": (F32_VALUE, struct.pack("<f", float("nan")))}, ("freq_base = nan",)),
    "scaling": ({"llama.rope.scaling.type": (STRING, string("spiral"))}, ("rope scaling 'spiral'",)),
    "scaling, a number": ({"llama.rope.scaling.type": NUMBERS}, ("rope scaling [7]",)),
    "yarn of nothing": ({"llama.rope.scaling.type": (STRING, string("yarn"))}, ("original_max_position_embeddings",)),
    "other sizes": ({"llama.feed_forward_length": u32(128)}, ("ffn_gate.weight is (96, 64), by its metadata it should be",)),
    "no tokenizer": ({"tokenizer.ggml.model": None}, ("tokenizer is of type None", "llama and gpt2")),
    "no tokens": ({"tokenizer.ggml.tokens": None}, ("tokenizer is not in order", "tokenizer.ggml.tokens")),
    "tokens are a number": ({"tokenizer.ggml.tokens": u32(7)}, ("tokenizer is not in order",)),
    "tokens are numbers": ({"tokenizer.ggml.tokens": NUMBERS}, ("tokenizer is not in order",)),
    "no scores": ({"tokenizer.ggml.scores": None}, ("tokenizer is not in order", "tokenizer.ggml.scores")),
    "one score": ({"tokenizer.ggml.scores": (ARRAY, struct.pack("<IQf", 6, 1, 0))}, ("tokenizer is not in order",)),
    "kinds are words": ({"tokenizer.ggml.token_type": (ARRAY, struct.pack("<IQ", 8, 420) + string("x") * 420)}, ("tokenizer",)),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_METADATA)
def test_metadata_that_cannot_be(gguf, tmp_path, case):
    changes, saying = ODD_METADATA[case]
    path = tmp_path / "model.gguf"
    altered(gguf(), path, changes)
    refused(tmp_path, "to-hf", path, tmp_path / "out", saying=saying)
    refused(tmp_path, "convert", path, tmp_path / "out", saying=saying)
    assert run("inspect", path).exit_code == 0
    # in a process of its own: llama.cpp may not survive what it reads
    child = process(tmp_path, "chat", path, "--prompt", "x", "--format", "chatml", "--max-tokens", 1)
    _, stderr = child.communicate()
    assert child.returncode in (0, 1), stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("command", ["inspect", "quantize", "imatrix", "evaluate", "chat", "to-hf"])
def test_one_file_of_several(gguf, tmp_path, command):
    """llama.cpp would find the others by their names; what we say of the model would be of the first alone."""
    path = tmp_path / "model-00001-of-00003.gguf"
    altered(gguf(), path, {"split.count": (U16, struct.pack("<H", 3)), "split.no": (U16, struct.pack("<H", 0))})
    more = {"quantize": [tmp_path / "out.gguf", "-t", "Q8_0"], "to-hf": [tmp_path / "out"], "chat": ["--prompt", "x"]}
    saying = ("is one of 3 files that make a model", "llama-gguf-split --merge")
    refused(tmp_path, command, path, *more.get(command, []), saying=saying)


ODD_FAMILIES: dict[str, tuple[str, dict[str, tuple[int, bytes] | None], tuple[str, ...]]] = {
    "experts in words": ("mixtral", {"llama.expert_count": TEXT}, ("llama.expert_count = 'seven', expected",)),
    "fewer experts": ("mixtral", {"llama.expert_count": u32(3)}, ("ffn_gate_inp.weight is (4, 64), by its", "(3, 64)")),
    "none chosen": ("mixtral", {"llama.expert_used_count": u32(0)}, ("expert_used_count = 0, expected",)),
    "no word of how many are chosen": ("mixtral", {"llama.expert_used_count": None}, ("has no llama.expert_used_count",)),
    "a million experts": ("mixtral", {"llama.expert_count": u32(10**6)}, ("expert_count = 1000000, expected",)),
    "too many chosen": ("mixtral", {"llama.expert_used_count": u32(5)}, ("num_experts_per_tok is 5", "no more than")),
    "dense, it says": ("mixtral", {"llama.expert_count": None}, ("LlamaForCausalLM does not have: blk.0.ffn_down_exps",)),
    "experts, it says": ("qwen2", {"qwen2.expert_count": u32(4)}, ("architecture qwen2 with experts", "cnq knows llama")),
    "other groups": (
        "internlm2", {"internlm2.attention.head_count_kv": u32(4)}, ("blk.0.attn_k.weight is (32, 64), by its", "(64, 64)"),
    ),
    "27 layers": ("baichuan-7b", {"baichuan.block_count": u32(27)}, ("num_hidden_layers = 27", "32 or 40")),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_FAMILIES)
def test_metadata_that_its_family_cannot_have(gguf, tmp_path, case):
    family, changes, saying = ODD_FAMILIES[case]
    altered(gguf(family=family), path := tmp_path / "model.gguf", changes)
    refused(tmp_path, "to-hf", path, tmp_path / "out", saying=saying)
    child = process(tmp_path, "chat", path, "--prompt", "x", "--format", "chatml", "--max-tokens", 1)
    _, stderr = child.communicate()
    assert child.returncode in (0, 1), stderr
    assert "Traceback" not in stderr


def test_a_part_of_a_packed_tensor_is_missing(originals, tmp_path, monkeypatch):
    plan = converting._plan
    monkeypatch.setattr(converting, "_plan", lambda *args: [t for t in plan(*args) if t.name != "blk.1.attn_k.weight"])
    path = converting.convert(originals(family="internlm2"), tmp_path / "model.gguf").path
    missing = "1 of 17 tensors are missing: model.layers.1.attention.wqkv.weight"
    refused(tmp_path, "to-hf", path, tmp_path / "out", saying=(missing,))


def test_ids_that_no_token_has_mean_none(gguf, tmp_path):
    path = tmp_path / "model.gguf"
    altered(gguf(), path, {f"tokenizer.ggml.{name}_token_id": u32(2**32 - 1) for name in ("padding", "unknown", "eos")})
    assert run("to-hf", path, tmp_path / "out").exit_code == 0
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {"bos_token"} == {key for key in config if key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    result = run("chat", path, "--prompt", "x", "--format", "chatml", "--max-tokens", 1)
    assert result.exit_code == 0, result.output


def test_a_gguf_without_tensors(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes())
    assert "0 weights" in run("inspect", path).stdout
    assert json.loads(run("inspect", path, "--json").stdout)["bits_per_weight"] == 0
    refused(tmp_path, "to-hf", path, tmp_path / "out", saying=("no llama.attention.head_count",))
    refused(tmp_path, "quantize", path, tmp_path / "out", "-t", "Q8_0", saying=("was not quantized",))


def test_names_cannot_write_to_the_terminal(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(tensors=(("\x1b[2Jall is well\n", (0,), 0, 0),)))
    refused(tmp_path, "inspect", path, saying=(r"\x1b[2Jall is well\n is (0,)",))


# Quantizing


def dat(sums: dict[str, np.ndarray], tail: bytes = b"") -> bytes:
    """A legacy importance matrix."""
    entries = [
        struct.pack("<i", len(name.encode())) + name.encode() + struct.pack("<ii", 1, values.size) + values.tobytes()
        for name, values in sums.items()
    ]
    return struct.pack("<i", len(sums)) + b"".join(entries) + tail


def imatrix_gguf(path: Path, sums: dict[str, np.ndarray]) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, arch="imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values[None])
        writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def sums(wide_gguf) -> dict[str, np.ndarray]:
    """Importance of every matrix of wide_gguf."""
    tensors = GgufFile(wide_gguf).tensors
    return {
        name: np.ones(t.shape[-1], np.float32) for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) > 1
    }


@pytest.mark.parametrize("form", ["gguf", "dat"])
@pytest.mark.parametrize(
    ("case", "saying"),
    {
        "another model": ("is of another model: it has blk.9.attn_q.weight", "which", "has not"),
        "other sizes": ("is of another model: 7 values for blk.0.attn_q.weight", "have 256"),
        "nan": ("not finite or negative for blk.0.attn_q.weight", "Compute the importance matrix again"),
        "inf": ("not finite or negative for blk.0.attn_q.weight",),
        "negative": ("not finite or negative for blk.0.attn_q.weight",),
        "nothing": ("importance", "again"),
        "cut": ("cut short", "again"),
        "empty": ("is empty",),
    }.items(),
)
def test_an_importance_matrix_that_does_not_fit(wide_gguf, sums, tmp_path, form, case, saying):
    content = {name: values.copy() for name, values in sums.items()}
    first = content["blk.0.attn_q.weight"]
    match case:
        case "another model":
            content["blk.9.attn_q.weight"] = first
        case "other sizes":
            content["blk.0.attn_q.weight"] = first[:7]
        case "nan" | "inf":
            first[3] = float(case)
        case "negative":
            first[3] = -1
        case "nothing":
            content.clear()
    path = tmp_path / f"importance.{form}"
    imatrix_gguf(path, content) if form == "gguf" else path.write_bytes(dat(content))
    if case in ("cut", "empty"):
        os.truncate(path, path.stat().st_size // 2 if case == "cut" else 0)
    refused(
        tmp_path, "quantize", wide_gguf, tmp_path / "out", "-t", "IQ2_XS", "--imatrix", path, saying=(path.name, *saying)
    )  # fmt: skip


def test_other_files_for_an_importance_matrix(wide_gguf, tmp_path, originals):
    weights = originals() / "model.safetensors"
    for path, saying in (
        (wide_gguf, ("has no imatrix.datasets", "cnq imatrix or llama-imatrix")),
        (weights, ("neither a GGUF nor a legacy importance matrix",)),
        (tmp_path, ("cannot be read: Is a directory",)),
        (tmp_path / "nowhere", ("cannot be read: No such file",)),
    ):
        refused(tmp_path, "quantize", wide_gguf, tmp_path / "out", "-t", "Q4_K", "--imatrix", path, saying=(path.name, *saying))


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_an_importance_matrix_without_what_the_type_needs(wide_gguf, sums, tmp_path, form):
    content = {name: values for name, values in sums.items() if name != "blk.1.ffn_down.weight"}
    path = tmp_path / f"importance.{form}"
    imatrix_gguf(path, content) if form == "gguf" else path.write_bytes(dat(content))
    args = ("quantize", wide_gguf, tmp_path / "out", "-t", "IQ1_S", "--imatrix", path)
    refused(tmp_path, *args, saying=("has nothing for blk.1.ffn_down.weight", "IQ1_S cannot do without"))


@pytest.mark.parametrize("type", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K_S"])
def test_types_that_need_an_importance_matrix(wide_gguf, tmp_path, type):
    refused(tmp_path, "quantize", wide_gguf, tmp_path / "out", "-t", type, saying=(type, "importance matrix", "--imatrix"))


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        (("-t", "Q4_K_XXL"), ("unknown type Q4_K_XXL", "Q4_K_M")),
        (("-t", ""), ("unknown type", "Q4_K_M")),
        (("-t", "Q4_K_M", "--output-type", "Q9"), ("unknown tensor type Q9", "Q6_K")),
        (("-t", "Q4_K_M", "--embedding-type", "Q9"), ("unknown tensor type Q9", "Q6_K")),
        (("-t", "Q4_K_M", "--tensor-type", "attn_v=Q9"), ("unknown tensor type Q9", "Q6_K")),
        (("-t", "Q4_K_M", "--tensor-type", "attn_v=Q4_K_M"), ("unknown tensor type Q4_K_M", "Q4_K")),
        (("-t", "Q4_K_M", "--tensor-type", "attn_(=Q8_0"), ("attn_(: not a regular expression",)),
        (("-t", "Q4_K_M", "--tensor-type", "moe=Q8_0"), ("moe: no tensor has such a name", "token_embd.weight")),
        (("-t", "BF16", "--tensor-type", "attn_v=Q8_0"), ("--tensor-type has no effect with BF16",)),
        (("-t", "Q4_K_M", "--tensor-type", "ffn_down=IQ2_XS"), ("importance matrix", "--imatrix")),
    ],
)
def test_wishes_that_cannot_be_met(wide_gguf, tmp_path, options, saying):
    refused(tmp_path, "quantize", wide_gguf, tmp_path / "out", *options, saying=saying)


@pytest.mark.parametrize("wish", ["nonsense", "=Q8_0", ""])
def test_a_wish_of_no_form_is_a_usage_error(wide_gguf, tmp_path, wish):
    result = run("quantize", wide_gguf, tmp_path / "out", "-t", "Q4_K_M", "--tensor-type", wish)
    assert result.exit_code == 2
    assert f"{wish!r}: expected PATTERN=TYPE, e.g. attn_v=Q8_0." in " ".join(result.stderr.split())
    assert tree(tmp_path) == {tmp_path / "tmp"}


@pytest.mark.parametrize("name", ["I8", "I64", "F64", "Q8_K", "Q8_1"])
def test_tensor_types_that_cannot_be_stored(wide_gguf, tmp_path, name):
    for option in (("--output-type", name), ("--tensor-type", f"attn_v={name}")):
        refused(tmp_path, "quantize", wide_gguf, tmp_path / "out", "-t", "Q4_K_M", *option, saying=(name,))


def test_what_is_quantized_is_not_quantized_again(wide_gguf, tmp_path):
    once = tmp_path / "once.gguf"
    assert run("quantize", wide_gguf, once, "-t", "Q8_0").exit_code == 0
    args = ("quantize", once, tmp_path / "out", "-t", "Q4_K_M")
    refused(tmp_path, *args, saying=("is quantized already (Q8_0)", "Start from the F16 file", "--allow-requantize"))
    assert run(*args, "--allow-requantize").exit_code == 0


# Damage at random


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A reader that believes a count in a damaged file runs into these."""

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError("a damaged file is read for a minute")

    used = psutil.Process().memory_info().vms
    limits = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
    signal.alarm(60)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, old)


NUMBERS_AT_THE_EDGE = [0, 1, 31, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def damaged(sound: bytes, random: random.Random, until: int) -> bytes:
    """One to three bytes, numbers or pieces changed, mostly before `until`; or the end cut off."""
    data = bytearray(sound)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(until if random.random() < 0.9 else len(data) + 1)
        match random.randrange(5):
            case 0:
                data[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                data[at : at + 8] = struct.pack("<Q", random.choice(NUMBERS_AT_THE_EDGE))
            case 2:
                data[at : at + 4] = struct.pack("<I", random.choice(NUMBERS_AT_THE_EDGE) % 2**32)
            case 3:
                del data[at : at + random.randrange(64)]
            case 4:
                data[at:at] = data[at : at + random.randrange(64)]
    return bytes(data[: random.randrange(len(data))] if random.random() < 0.1 else data)


def small(src: Path, dst: Path) -> Path:
    """The GGUF with ten tokens, so that damage meets the other metadata, too."""
    file = GgufFile(src)
    words = b"".join(string(t) for t in file.fields["tokenizer.ggml.tokens"][:10])
    altered(src, dst, {
        "tokenizer.ggml.tokens": (ARRAY, struct.pack("<IQ", STRING, 10) + words),
        "tokenizer.ggml.scores": (ARRAY, struct.pack("<IQ10f", 6, 10, *range(10))),
        "tokenizer.ggml.token_type": (ARRAY, struct.pack("<IQ10i", 5, 10, *[1] * 10)),
    })  # fmt: skip
    return dst


def test_damaged_ggufs(gguf, tmp_path, little_memory):
    """Reading either works or raises GgufError; to-hf a CnqError."""
    from cnq.to_hf import to_hf

    source = small(gguf(), tmp_path / "small.gguf")
    sound, header = source.read_bytes(), GgufFile(source).meta_bytes
    dice = random.Random(0)
    path, failed = tmp_path / "model.gguf", 0
    for i in range(400):
        path.write_bytes(damaged(sound, dice, header))
        try:
            inspect(path)
            file = GgufFile(path)
            for name in file.tensors:
                file.tensor(name).float32()
        except GgufError:
            failed += 1
        if i % 2:
            try:
                to_hf(path, tmp_path / "out")
            except CnqError:
                assert not (tmp_path / "out").exists()
            else:
                shutil.rmtree(tmp_path / "out")
    assert 100 < failed < 400
    assert tree(tmp_path) == {source, path, tmp_path / "tmp"}


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_damaged_importance_matrices(tmp_path, little_memory, form):
    sums = {f"blk.{i}.attn_q.weight": np.arange(8, dtype=np.float32) for i in range(3)}
    path = tmp_path / f"importance.{form}"
    tail = struct.pack("<ii", 5, 4) + b"text"
    sound = imatrix_gguf(path, sums).read_bytes() if form == "gguf" else dat(sums, tail)
    dice = random.Random(0)
    failed = 0
    for _ in range(400):
        path.write_bytes(damaged(sound, dice, len(sound)))
        try:
            importance = read_imatrix(path)
            assert all(np.isfinite(values).all() for values in importance.means().values())
        except GgufError:
            failed += 1
    assert 100 < failed < 400


JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    3.5,
    2**40,
    10**400,
    1e308,
    "",
    "x",
    "\ud800",
    [],
    ["x"],
    [[]],
    {},
    {"x": "y"},
    {"id": -1},
]


def with_junk(value: Any, dice: random.Random) -> Any:
    """A copy of a JSON value with one part of it replaced."""
    if isinstance(value, dict | list) and value and dice.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        copy = value.copy()
        key = dice.choice(keys)
        copy[key] = with_junk(value[key], dice)
        return copy
    return dice.choice(JUNK)


@pytest.mark.parametrize("vocab", ["spm-added", "spm-json", "llama-bpe"])
def test_json_with_junk(originals, tmp_path, vocab):
    """Converting a checkpoint either works or raises a CnqError."""
    if vocab != "spm-added":
        pytest.importorskip("tokenizers")
    from cnq.convert import convert

    original = originals(vocab=vocab)
    model = tmp_path / "model"
    shutil.copytree(original, model)
    (model / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 40}')
    (model / "README.md").write_text('---\n{"license": "other", "language": ["zh"], "base_model": "a/b"}\n---\n')
    sound = {p: json.loads(p.read_text()) for p in sorted(model.glob("*.json"))}
    dice = random.Random(0)
    failed = 0
    for _ in range(120):
        path = dice.choice(list(sound))
        path.write_text(json.dumps(with_junk(sound[path], dice)))
        try:
            convert(model, tmp_path / "out.gguf", force=True)
        except CnqError:
            failed += 1
        path.write_text(json.dumps(sound[path]))
    assert 10 < failed < 120
    assert {p.name for p in tmp_path.iterdir()} <= {"model", "out.gguf", "tmp"}


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.model", "pytorch_model.bin"])
def test_damaged_checkpoints(model, tmp_path, file):
    from cnq.convert import convert

    folder = model()
    if file == "pytorch_model.bin":
        pickled(folder, "one")
    path = folder / file
    sound = path.read_bytes()
    dice = random.Random(0)
    failed = 0
    for _ in range(120):
        path.write_bytes(damaged(sound, dice, 2000))
        try:
            convert(folder, tmp_path / "out.gguf", force=True)
        except CnqError:
            failed += 1
    assert 10 < failed <= 120
    assert {p.name for p in tmp_path.iterdir()} <= {"model", "out.gguf", "tmp"}


def test_code_that_lies_in_the_folder_one_works_in_is_not_run(wide_gguf, tmp_path, monkeypatch):
    for name in ("json.py", "cnq.py", "pip.py"):
        (tmp_path / name).write_text("raise SystemExit('run')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = run("quantize", wide_gguf, tmp_path / "out.gguf", "-t", "Q8_0")
    assert result.exit_code == 0, result.output

"""training.merge_lora against PEFT's merge_and_unload in float32, to the last bit, and against PEFT's own model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_lora
from click.testing import CliRunner

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import tiny_meta  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from cnq.adapters import low_rank  # noqa: E402
from cnq.adapters.adapter import LowRank  # noqa: E402
from cnq.adapters.settings import read_settings  # noqa: E402
from cnq.checkpoint import open_checkpoint  # noqa: E402
from cnq.checkpoint.checkpoint import Entry  # noqa: E402
from cnq.errors import CheckpointError, OutputExists  # noqa: E402
from cnq.gguf_file import F32, Tensor  # noqa: E402
from training.merge_lora import Merged, main, merge_lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers have much to say of what is tested here
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Callable[..., Path]:
    """base(**arguments of tiny.checkpoint) -> a checkpoint, made once."""
    made: dict[str, Path] = {}

    def make(**settings) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = tiny.checkpoint(tmp_path_factory.mktemp("base") / "my-base", **settings)
        return made[key]

    return make


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained(base: Path, folder: Path, rows: int = 0, **settings: Any) -> Any:
    """An adapter as PEFT saves it, its weights random, and the model it was trained in. rows: that the embedding grew to."""
    torch.manual_seed(len(folder.name))
    model = load(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(**({"r": 8, "lora_alpha": 16} | settings)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if rows:
        tiny_lora.tokenizer(folder, rows)
    return model.eval()


def with_peft(base: Path, *loras: Path) -> Any:
    """The model that PEFT makes of base and adapters, merged one after the other in float32."""
    model = load(base)
    for lora in loras:
        if (lora / "added_tokens.json").is_file():
            model.resize_token_embeddings(420 + len(json.loads((lora / "added_tokens.json").read_text())))
        model = peft.PeftModel.from_pretrained(model, lora).merge_and_unload()
    return model


def bits(state: dict[str, Any], names: Any, dtype: str) -> dict[str, bytes]:
    return {name: state[name].to(TYPES[dtype]).contiguous().view(torch.uint8).numpy().tobytes() for name in names}


def our_bits(folder: Path) -> dict[str, bytes]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name).data.tobytes() for name in checkpoint.entries}


def equal_to_peft(base: Path, loras: list[Path], out: Path, dtype: str = "F16") -> Merged:
    result = merge_lora(base, loras, out)
    ours = our_bits(out)
    theirs = bits(with_peft(base, *loras).state_dict(), ours, dtype)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    return result


# Everything that PEFT merges

QV = ["q_proj", "v_proj"]
LORAS: dict[str, dict[str, Any]] = {
    "rank 8": {"target_modules": QV},
    "rank 64": {"target_modules": ["up_proj", "down_proj"], "r": 64},
    "rslora": {"target_modules": "all-linear", "r": 16, "lora_alpha": 32, "use_rslora": True},
    "regex": {"target_modules": r".*layers\.1.*(gate|k)_proj"},
    "rank pattern": {"target_modules": QV, "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 4}},
    "alpha pattern": {"target_modules": QV, "alpha_pattern": {r".*\.0\..*": 3}, "rank_pattern": {"q_proj": 5}},
    "fan_in_fan_out": {"target_modules": QV, "fan_in_fan_out": True},
    "DoRA": {"target_modules": [*QV, "gate_proj"], "use_dora": True},
    "DoRA, embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole modules": {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head", "norm", "input_layernorm"]},
    "tokens": {"target_modules": QV, "trainable_token_indices": [5, 1, 7]},
    "tokens of both": {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}},
    "grown": {"target_modules": QV, "rows": 421},
    "grown, whole": {"target_modules": QV, "rows": 421, "modules_to_save": ["embed_tokens", "lm_head"]},
    "grown, low rank": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "rows": 421},
    "MiCA": {"target_modules": QV, "init_lora_weights": "mica"},
}
BIASED: dict[str, dict[str, Any]] = {
    "all biases": {"target_modules": ["q_proj", "o_proj"], "bias": "all"},
    "biases of the targets": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "a bias of lora_B": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
}
TIED: dict[str, dict[str, Any]] = {
    "tied": {"target_modules": QV},
    "tied, whole embedding": {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
    "tied, both whole": {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tied, both whole and kept tied": {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied, tokens": {"target_modules": QV, "trainable_token_indices": [1, 5]},
    "tied, grown": {"target_modules": QV, "rows": 421},
}
# Not what PEFT merges, for it adds to the shared rows what belongs to one of the two: only what its model computes.
SHARED: dict[str, dict[str, Any]] = {
    "tied, low rank in the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tied, low rank in the head": {"target_modules": ["q_proj", "lm_head"]},
    "tied, low rank in both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tied, low rank kept tied": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
}
MODELS = (
    {name: {} for name in LORAS}
    | {n: {"family": "qwen2"} for n in BIASED}
    | {n: {"tie_word_embeddings": True} for n in TIED | SHARED}
)
CASES = LORAS | BIASED | TIED | SHARED


@pytest.mark.parametrize("case", LORAS | BIASED | TIED)
def test_a_merge_equals_pefts_to_the_last_bit(case, base, tmp_path):
    """In all three types: PEFT's merge in float32, rounded to the type that the base is in."""
    trained(base(**MODELS[case]), tmp_path / "lora", **CASES[case])
    for dtype in TYPES:
        equal_to_peft(base(dtype=dtype, **MODELS[case]), [tmp_path / "lora"], tmp_path / dtype, dtype)


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_computes_what_pefts_does(case, base, tmp_path):
    source = base(dtype="F32", **MODELS[case])
    model = trained(source, tmp_path / "lora", **CASES[case])
    merge_lora(source, [tmp_path / "lora"], tmp_path / "out")
    tokens = torch.tensor([np.random.default_rng(0).integers(3, 400, 40).tolist()])
    with torch.no_grad():
        want, got, before = (m(tokens).logits[..., :420] for m in (model, load(tmp_path / "out"), load(source)))
    assert (want - before).abs().max() > 0.05  # the adapter says something
    assert (want - got).abs().max() < 2e-4


def test_a_merge_of_two_with_a_growing_vocabulary_equals_pefts(base, tmp_path):
    """LLaMA + Chinese-LLaMA-Plus (49953) + Chinese-Alpaca-Plus (49954, another rank), on a small scale."""
    trained(base(), tmp_path / "llama-plus", rows=421, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
    between = merge_lora(base(), [tmp_path / "llama-plus"], tmp_path / "between").path
    alpaca = {"r": 64, "target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]}
    trained(between, tmp_path / "alpaca-plus", rows=422, **alpaca)
    loras = [tmp_path / "llama-plus", tmp_path / "alpaca-plus"]
    result = equal_to_peft(base(), loras, tmp_path / "out")
    assert [(e.adapter, e.ranks, e.modules, e.whole) for e in result.effects] == [
        ("llama-plus", (8,), 14, 2), ("alpaca-plus", (64,), 14, 2),
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 422
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 422


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_an_adapter_in_half_precision(dtype, base, tmp_path):
    trained(base(), tmp_path / "lora", target_modules=QV)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: t.to(TYPES[dtype]) for name, t in load_file(file).items()}, file)
    equal_to_peft(base(), [tmp_path / "lora"], tmp_path / "out")


def test_a_pickled_adapter(base, tmp_path):
    trained(base(), tmp_path / "lora", target_modules=QV)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    equal_to_peft(base(), [tmp_path / "lora"], tmp_path / "out")


@pytest.mark.parametrize("whole", [[], ["embed_tokens", "lm_head"]], ids=["low rank", "whole modules"])
def test_a_trainers_checkpoint_with_the_whole_models_state(whole, base, tmp_path):
    model = trained(base(), tmp_path / "lora", target_modules=QV, modules_to_save=whole)
    merge_lora(base(), [tmp_path / "lora"], tmp_path / "want")
    (tmp_path / "checkpoint-200").mkdir()
    torch.save(model.state_dict(), tmp_path / "checkpoint-200" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="--lora-alpha A --lora-rank R"):
        merge_lora(base(), [tmp_path / "checkpoint-200"], tmp_path / "out")
    merge_lora(base(), [tmp_path / "checkpoint-200"], tmp_path / "out", alpha=16, rank=8)
    assert our_bits(tmp_path / "out") == our_bits(tmp_path / "want")


@pytest.mark.parametrize("shape", [(1024, 1024, 8), (4096, 1024, 64), (2816, 4096, 128), (32003, 512, 64)])
def test_large_matrices_equal_pefts(shape):
    """The product of a model's real sizes, in which the order of adding shows."""
    rows, columns, rank = shape
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False))
    values = module[0].weight.detach().numpy().copy()
    settings = peft.LoraConfig(r=rank, lora_alpha=rank * 3, target_modules=["0"], init_lora_weights=False)
    module = peft.get_peft_model(module, settings)
    layer = module.base_model.model[0]
    low_rank.add(values, change(layer.lora_A.default.weight, layer.lora_B.default.weight, rank, 3.0))
    assert np.array_equal(values, module.merge_and_unload()[0].weight.detach().numpy())


def test_a_layer_of_gpt2_is_stored_the_other_way_round():
    torch.manual_seed(0)
    module = torch.nn.Sequential(transformers.pytorch_utils.Conv1D(96, 64))
    values = module[0].weight.detach().numpy().copy()
    settings = peft.LoraConfig(r=8, lora_alpha=4, target_modules=["0"], init_lora_weights=False, fan_in_fan_out=True)
    module = peft.get_peft_model(module, settings)
    layer = module.base_model.model[0]
    low_rank.add(values, change(layer.lora_A.default.weight, layer.lora_B.default.weight, 8, 0.5), transposed=True)
    assert np.array_equal(values, module.merge_and_unload()[0].weight.detach().numpy())


def change(a: Any, b: Any, rank: int, scale: float) -> LowRank:
    def weight(x: np.ndarray) -> Any:
        return Entry(F32, x.shape), lambda: Tensor("x", F32, x.shape, x)

    return LowRank(rank, scale, False, *(weight(x.detach().numpy().copy()) for x in (a, b)))


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "xq_proj"])
def test_ranks_and_scales_follow_pefts_patterns(module, tmp_path):
    from peft.utils.other import get_pattern_key

    ranks = {"q_proj": 2, r"layers\.1\..*": 3, r"layers\.\d+\.mlp\.down_proj": 4, "head": 5, "lm_head": 6}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 1, "rank_pattern": ranks, "target_modules": ["q_proj"]})
    )
    assert read_settings(tmp_path).rank_of(module) == ranks.get(get_pattern_key(ranks.keys(), module), 8)


# Bases and outputs


def test_a_base_in_metas_layout_and_an_output_in_it(base, tmp_path):
    trained(base(), tmp_path / "lora", rows=421, target_modules=QV, modules_to_save=["embed_tokens", "lm_head"])
    meta = tiny_meta.checkpoint(base(), tmp_path / "meta")
    want = our_bits(merge_lora(base(), [tmp_path / "lora"], tmp_path / "hf").path)
    assert our_bits(merge_lora(meta, [tmp_path / "lora"], tmp_path / "from-meta").path) == want
    result = merge_lora(base(), [tmp_path / "lora"], tmp_path / "pth", output_type="pth", shards=2)
    assert sorted(p.name for p in result.path.glob("*.pth")) == ["consolidated.00.pth", "consolidated.01.pth"]
    assert our_bits(result.path) == want  # 421 rows: one more in the last shard
    records = [json.loads((tmp_path / out / "cnq_merge.json").read_text()) for out in ("hf", "pth")]
    assert records[0] == records[1]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_another_type_is_rounded_to_once(dtype, base, tmp_path):
    """Not by way of the base's float16."""
    trained(base(), tmp_path / "lora", target_modules="all-linear")
    result = merge_lora(base(), [tmp_path / "lora"], tmp_path / "out", dtype=dtype)
    ours = {
        name: raw for name, raw in our_bits(tmp_path / "out").items() if "norm" not in name
    }  # which stay as exact as they are
    assert ours == bits(with_peft(base(), tmp_path / "lora").state_dict(), ours, dtype.upper())
    assert result.dtype == dtype.upper()
    pth = merge_lora(base(), [tmp_path / "lora"], tmp_path / "pth", dtype=dtype, output_type="pth").path
    assert ours == {name: raw for name, raw in our_bits(pth).items() if name in ours}


def test_shards_are_as_large_as_asked(base, tmp_path):
    trained(base(), tmp_path / "lora", target_modules=QV)
    merge_lora(base(), [tmp_path / "lora"], tmp_path / "one")
    merge_lora(base(), [tmp_path / "lora"], tmp_path / "many", max_shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert our_bits(tmp_path / "many") == our_bits(tmp_path / "one")


def test_nothing_that_is_merged_from_is_written_over(base, tmp_path):
    source = shutil.copytree(base(), tmp_path / "models" / "base")
    trained(source, tmp_path / "models" / "lora", target_modules=QV)
    for out in (source, tmp_path / "models" / "lora", tmp_path / "models"):
        with pytest.raises(OutputExists, match="which is merged from"):
            merge_lora(source, [tmp_path / "models" / "lora"], out, force=True)
    assert our_bits(source) == our_bits(base())


# The command


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command_states_the_memory_and_shows_what_each_adapter_did(base, tmp_path):
    trained(base(), tmp_path / "one", target_modules=QV)
    trained(base(), tmp_path / "two", target_modules="all-linear", use_rslora=True)
    arguments = (base(), tmp_path / "one", tmp_path / "two", tmp_path / "out")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "of memory for the largest tensor" in result.stderr
    for part in ("one", "two", "model.layers.", "out/: 21 tensors, F16"):
        assert part in result.stdout
    assert json.loads(run(*arguments, "--force", "--json").stdout)["effects"][1]["modules"] == 14


def test_the_command_refuses_in_one_line(base, tmp_path):
    trained(base(), tmp_path / "lora", target_modules=QV)
    wrong = run(base(), tmp_path / "lora", tmp_path / "out", "--lora-alpha", 16, "--lora-rank", 8)
    assert (wrong.exit_code, "every adapter has its adapter_config.json" in wrong.stderr) == (2, True)
    assert "no LORA to merge" in run(base(), tmp_path / "out").stderr
    other = tiny.checkpoint(tmp_path / "other", hidden_size=128)
    result = run(other, tmp_path / "lora", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "another base" in result.stderr
    assert not (tmp_path / "out").exists()
    assert "no path here, no hub id" in run("no-such-model", tmp_path / "lora", tmp_path / "out").stderr


def test_a_recipe_of_the_catalog_brings_its_adapters(base, tmp_path, monkeypatch):
    from cnq import catalog

    trained(base(), tmp_path / "one", target_modules=QV)
    trained(base(), tmp_path / "two", target_modules=["o_proj"])
    recipe = catalog.Model(name="my-plus", title="My-Plus", path=base(), loras=(str(tmp_path / "one"),))
    monkeypatch.setattr(catalog, "models", lambda: {"my-plus": recipe})
    assert run("my-plus", tmp_path / "out").exit_code == 0
    assert our_bits(tmp_path / "out") == our_bits(merge_lora(base(), [tmp_path / "one"], tmp_path / "want").path)
    assert run("my-plus", tmp_path / "two", tmp_path / "more").exit_code == 0
    record = json.loads((tmp_path / "more" / "cnq_merge.json").read_text())
    assert [adapter["name"] for adapter in record["adapters"]] == ["one", "two"]

"""Adapters are read, checked and merged by the formulas of LoRA, or refused with what was found and what to do."""

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_lora
from safetensors.numpy import load_file
from tiny_lora import PREFIX

from cnq import files
from cnq.adapters import arithmetic, low_rank, merge, read_adapter
from cnq.adapters.adapter import LowRank
from cnq.checkpoint import open_checkpoint
from cnq.checkpoint.checkpoint import Entry
from cnq.checkpoint.digest import content_digest
from cnq.convert import convert
from cnq.errors import CheckpointError, CnqError, GgufError, NoSpace, VocabMismatch
from cnq.gguf_file import BF16, F32, GgufFile, Tensor
from cnq.quantize import quantize
from cnq.to_hf import to_hf, write_hf

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("base") / "my-base")


@pytest.fixture
def lora(base, tmp_path) -> Callable[..., Path]:
    """lora(name, **arguments of tiny_lora.adapter) -> an adapter of the base."""
    return lambda name="my-lora", **settings: tiny_lora.adapter(tmp_path / name, base, **settings)


def merged(base: Path, *loras: Path, dtype=None) -> dict[str, Tensor]:
    checkpoint = merge(open_checkpoint(base), [read_adapter(path) for path in loras], dtype).checkpoint
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def matrices(lora: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
    tensors = load_file(lora / "adapter_model.safetensors")
    return tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"]


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many float16 numbers lie between."""
    order = [np.where(x.view(np.int16) < 0, -0x8000 - x.view(np.int16).astype(int), x.view(np.int16)) for x in (a, b)]
    return abs(order[0] - order[1])


# Merging


def test_a_merge_is_the_base_and_the_scaled_product(base, lora):
    old, new, path = open_checkpoint(base), merged(base, lora()), lora()
    for name, tensor in new.items():
        module = name.removesuffix(".weight")
        before = old.read(name)
        assert (tensor.name, tensor.type, tensor.shape) == (name, before.type, before.shape)
        if module.endswith(("q_proj", "down_proj")):
            a, b = matrices(path, module)
            want = before.data.astype(np.float64) + 2.0 * b.astype(np.float64) @ a.astype(np.float64)
            assert ulps(want.astype(np.float16), tensor.data).max() <= 1
        else:
            assert np.array_equal(before.data, tensor.data)


def test_without_torch_the_same_comes_out_but_for_a_last_bit_now_and_then(base, lora, monkeypatch):
    pytest.importorskip("torch")
    path = lora(targets=tiny_lora.ALL)
    with_torch = merged(base, path)
    monkeypatch.setitem(sys.modules, "torch", None)
    without = merged(base, path)
    apart = np.concatenate([ulps(with_torch[n].data, without[n].data).ravel() for n in without])
    assert apart.max() <= 1
    assert apart.mean() < 1e-3


def test_adapters_are_merged_in_order_and_rounded_once(base, lora):
    """Two changes that cancel leave the base, not its twice rounded neighbour."""
    one = lora("one", size=30)
    tensors = load_file(one / "adapter_model.safetensors")
    opposite = {name: -t if "lora_B" in name else t for name, t in tensors.items()}
    two = lora("two", extra=opposite)
    there_and_back = {name: tensor.data for name, tensor in merged(base, one, two).items()}
    assert np.abs(merged(base, one)[f"{Q0}.weight"].data).max() > 10
    # float32 at 10 is good for 1e-6; rounded to float16 in between, 4e-3 would be lost
    assert all(np.abs(t - open_checkpoint(base).read(n).data).max() < 1e-5 for n, t in there_and_back.items())


def test_the_scale_of_rslora_and_of_patterns(base, lora):
    plain = read_adapter(lora("plain"))
    assert plain.low_rank[Q0].scale == 2.0
    assert read_adapter(lora("rs", use_rslora=True)).low_rank[Q0].scale == 16 / 8**0.5
    path = lora("patterns", alpha_pattern={r"layers\.0\..*": 4, "down_proj": 64})
    found = read_adapter(path).low_rank
    assert (found[Q0].scale, found[DOWN1].scale) == (0.5, 8.0)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_the_type_of_the_adapter_and_the_type_asked_for(base, lora, dtype):
    path = lora(dtype=dtype)
    assert merged(base, path)[f"{Q0}.weight"].type.name == "F16"
    wide = merged(base, path, dtype=F32)
    a, b = (weight[1]().float32() for weight in (read_adapter(path).low_rank[Q0].a, read_adapter(path).low_rank[Q0].b))
    want = open_checkpoint(base).read(f"{Q0}.weight").float32() + np.float32(2) * (b @ a)
    assert np.allclose(wide[f"{Q0}.weight"].data, want, atol=1e-6)
    assert {tensor.type.name for tensor in wide.values() if len(tensor.shape) == 2} == {"F32"}
    assert wide["model.norm.weight"].type.name == "F16"


def test_a_matrix_stored_the_other_way_round():
    """fan_in_fan_out, as in GPT-2."""

    def weight(x: np.ndarray) -> Any:
        return Entry(F32, x.shape), lambda: Tensor("x", F32, x.shape, x)

    a, b, w = (tiny_lora.values(n, s) for n, s in (("a", (4, 6)), ("b", (10, 4)), ("w", (10, 6))))
    change = LowRank(4, 0.5, False, weight(a), weight(b), weight(np.linspace(1, 2, 10, dtype=np.float32)))
    straight, turned = w.copy(), np.ascontiguousarray(w.T)
    assert low_rank.add(straight, change) == pytest.approx(low_rank.add(turned, change, transposed=True), rel=1e-5)
    assert np.allclose(straight, turned.T, rtol=1e-5)


def test_dora_brings_rows_to_the_lengths_that_were_trained(base, lora):
    lengths = {f"{PREFIX}{m}.lora_magnitude_vector": np.linspace(1, 3, 64, dtype=np.float32) for m in modules(base)}
    path = lora(use_dora=True, extra=lengths)
    found = merged(base, path)[f"{Q0}.weight"].data.astype(np.float64)
    assert np.allclose(np.linalg.norm(found, axis=1), np.linspace(1, 3, 64), rtol=1e-3)
    a, b = matrices(path, Q0)
    direction = open_checkpoint(base).read(f"{Q0}.weight").data + 2.0 * b @ a
    assert np.allclose(
        found / np.linalg.norm(found, axis=1)[:, None], direction / np.linalg.norm(direction, axis=1)[:, None], atol=1e-3
    )


def modules(base: Path) -> list[str]:
    return [n.removesuffix(".weight") for n in tiny_lora.shapes(base) if n.endswith(("q_proj.weight", "down_proj.weight"))]


# A vocabulary that grows


def test_whole_embeddings_resize_the_model_and_bring_their_tokenizer(base, lora, tmp_path):
    path = lora(rows=421)  # odd, as 49953 is
    merging = merge(open_checkpoint(base), [read_adapter(path)])
    checkpoint = merging.checkpoint
    assert checkpoint.config["vocab_size"] == 421
    assert checkpoint.entries["lm_head.weight"].shape == (421, 64)
    want = load_file(path / "adapter_model.safetensors")[f"{PREFIX}lm_head.weight"].astype(np.float16)
    assert np.array_equal(checkpoint.read("lm_head.weight").data, want)
    written = write_hf(checkpoint, tmp_path / "out")
    assert json.loads((written.path / "config.json").read_text())["vocab_size"] == 421
    assert (written.path / "added_tokens.json").read_bytes() == (path / "added_tokens.json").read_bytes()
    assert convert(written.path, tmp_path / "out.gguf").n_vocab == 421


def test_of_two_the_last_embedding_and_the_last_tokenizer_count(base, lora, tmp_path):
    """As Chinese-LLaMA-Plus (49953) and Chinese-Alpaca-Plus (49954) are merged."""
    llama, alpaca = lora("llama-plus", rows=421), lora("alpaca-plus", rows=422, rank=16)
    merging = merge(open_checkpoint(base), [read_adapter(llama), read_adapter(alpaca)])
    embedding = load_file(alpaca / "adapter_model.safetensors")[f"{PREFIX}model.embed_tokens.weight"].astype(np.float16)
    assert np.array_equal(merging.checkpoint.read("model.embed_tokens.weight").data, embedding)
    assert merging.checkpoint.config["vocab_size"] == 422
    (tmp_path / "scratch").mkdir()
    tokens = json.loads((merging.checkpoint.tokenizer(tmp_path / "scratch") / "added_tokens.json").read_text())
    assert tokens == {"[ADDED420]": 420, "[ADDED421]": 421}


def test_adapters_in_the_wrong_order_are_refused(base, lora):
    """49954 before 49953."""
    llama, alpaca = lora("llama-plus", rows=421), lora("alpaca-plus", rows=422)
    says = (
        "llama-plus has an embedding of 421 rows, alpaca-plus, given before it, one of 422.*Give llama-plus before alpaca-plus"
    )
    refused(says, base, alpaca, llama)


def test_an_adapter_of_a_smaller_vocabulary_is_of_another_base(base, lora):
    path = lora(rows=420)
    grown = merge(open_checkpoint(base), [read_adapter(lora("grown", rows=424))]).checkpoint
    with pytest.raises(CheckpointError, match=r"an embedding of 420 rows, the base .* one of 424.*another base"):
        merge(grown, [read_adapter(path)])


def test_an_adapter_whose_tokenizer_is_not_its_own_is_refused(base, lora):
    path = lora(rows=421)
    tiny_lora.tokenizer(path, 422)
    with pytest.raises(VocabMismatch, match=r"the adapter's tokenizer and its embedding, 421 rows.*422 tokens"):
        merged(base, path)


def test_a_tokenizer_that_grew_without_an_embedding_is_refused(base, lora):
    path = lora()
    tiny_lora.tokenizer(path, 421)
    with pytest.raises(VocabMismatch, match="the embedding it is merged into, 420 rows"):
        merged(base, path)


def test_an_embedding_that_grew_without_the_head_is_refused(base, lora):
    path = lora(rows=421, modules_to_save=["embed_tokens"])
    tensors = load_file(path / "adapter_model.safetensors")
    del tensors[f"{PREFIX}lm_head.weight"]
    tiny.save(path / "adapter_model.safetensors", tensors, "F32")
    refused(
        "brings model.embed_tokens.weight with 421 rows, the base has 420.*lm_head.weight.*save_embedding_layers", base, path
    )


def test_trained_rows_take_their_places(base, lora):
    rows = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": tiny_lora.values("rows", (2, 64))}
    found = merged(base, lora(extra=rows, trainable_token_indices=[7, 3]))["model.embed_tokens.weight"].data
    want = open_checkpoint(base).read("model.embed_tokens.weight").data.copy()
    want[[7, 3]] = tiny_lora.values("rows", (2, 64))
    assert np.array_equal(found, want)


# Refused


def refused(saying: str, base: Path, *loras: Path) -> None:
    with pytest.raises(CheckpointError, match=saying):
        merged(base, *loras)


def test_an_empty_adapter_is_refused(base, lora):
    path = lora()
    tiny.save(path / "adapter_model.safetensors", {}, "F32")
    refused("adapter_model.safetensors .* bytes. holds no tensors.*empty adapter.*save_pretrained", base, path)


def test_an_adapter_of_443_bytes_is_refused(base, lora):
    """A pickle of no tensors; today's torch makes 1161 bytes of it, before 2.0 they were 443."""
    torch = pytest.importorskip("torch")
    path = lora()
    (path / "adapter_model.safetensors").unlink()
    torch.save({}, path / "adapter_model.bin")
    size = (path / "adapter_model.bin").stat().st_size
    refused(rf"adapter_model.bin \({size} bytes\) holds no tensors: training saved an empty adapter", base, path)


def test_an_adapter_that_was_saved_in_part_is_refused(base, lora):
    """The 127 KB of those that lack what modules_to_save names, or layers."""
    refused(
        "lacks 2 modules.*lm_head, model.embed_tokens.*not saved whole", base, lora(modules_to_save=["embed_tokens", "lm_head"])
    )
    path = lora("half", targets=("q_proj",), target_modules=["q_proj", "k_proj"])
    refused("lacks 2 modules.*layers.0.self_attn.k_proj", base, path)
    refused("lacks 12 modules", base, lora("all", targets=("q_proj",), target_modules="all-linear"))
    refused("lacks 2 modules", base, lora("regex", targets=("q_proj",), target_modules=r".*\.(q|v)_proj"))
    merged(base, lora("some", targets=("q_proj",), target_modules=["q_proj", "k_proj"], layers_to_transform=[0]))


Tensors = dict[str, np.ndarray]


def changed(path: Path, change: Callable[[Tensors], dict[str, np.ndarray | None]]) -> Path:
    """Put tensors into an adapter, or take out those that are None."""
    tensors = load_file(path / "adapter_model.safetensors")
    kept = {name: t for name, t in (tensors | change(tensors)).items() if t is not None}
    tiny.save(path / "adapter_model.safetensors", kept, "F32")
    return path


LAYER, A0, B0 = f"{PREFIX}{Q0}", f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
ONES = np.ones(64, np.float32)
TENSORS: dict[str, tuple[Callable[[Tensors], dict[str, np.ndarray | None]], str]] = {
    "no B": (lambda t: {B0: None}, f"{Q0} has lora_A but no lora_B"),
    "zero B": (lambda t: {B0: 0 * t[B0]}, f"{Q0}.lora_B is all zeros, as before training"),
    "not a number": (lambda t: {B0: np.nan * t[B0]}, f"{Q0}.lora_B holds numbers that are not finite"),
    "another rank": (
        lambda t: {B0: t[B0][:, :4]},
        r"lora_A \(8, 64\) and lora_B \(64, 4\), by its rank expected \(8, columns\)",
    ),
    "a shard": (lambda t: {B0: np.zeros(0, np.float32)}, r"lora_B \(0,\).*sharded matrices"),
    "other rows": (lambda t: {B0: t[B0][:48]}, r"q_proj.weight as \(48, 64\), in the base it is \(64, 64\).*another base"),
    "an unknown module": (
        lambda t: {A0.replace("q_proj", "x_proj"): t[A0], B0.replace("q_proj", "x_proj"): t[B0]},
        "x_proj.weight, which the base does not have.*another base",
    ),
    "LoHa": (lambda t: {f"{LAYER}.hada_w1_a": t[B0]}, "tensors that cnq does not know: .*hada_w1_a"),
    "another tensor": (lambda t: {f"{LAYER}.lora_C.weight": t[B0]}, "q_proj.lora_C.weight, which the base does not have"),
    "two adapters": (
        lambda t: {B0.replace("B.", "B.one."): t[B0], B0.replace("B.", "B.two."): t[B0]},
        "holds several adapters .one, two.",
    ),
    "twice": (lambda t: {B0.replace("weight", "default.weight"): t[B0]}, "says a second time what becomes of .*q_proj"),
    "two kinds": (lambda t: {f"{LAYER}.lora_embedding_A": t[A0]}, "changed as an embedding and as a linear layer"),
    "an embedding of no rows": (lambda t: {f"{PREFIX}lm_head.weight": ONES}, r"lm_head.weight as \(64,\), in the base it is"),
    "no rows": (
        lambda t: {f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta": np.zeros((0, 64), np.float32)},
        "says nothing of them",
    ),
    "no name of ours": (lambda t: {"x": t[B0]}, "tensors that cnq does not know: x"),
    "a model": (lambda t: dict.fromkeys(t) | {"model.norm.weight": ONES}, "no lora_A and lora_B"),
    "a magnitude": (lambda t: {f"{LAYER}.lora_magnitude_vector": ONES}, "settings are of plain LoRA"),
    "lora_bias": (lambda t: {f"{LAYER}.lora_B.bias": ONES}, "lora_B has a bias .*the base has none"),
    "rows": (lambda t: {f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta": t[A0]}, "says nothing of them"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_no_sound_adapter_of_the_base_are_refused(case, base, lora):
    change, saying = TENSORS[case]
    refused(saying, base, changed(lora(), change))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "LoHa": ({"peft_type": "LOHA"}, "peft_type 'LOHA'; cnq merges LORA"),
    "IA3": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING'"),
    "no type": ({"peft_type": None}, "peft_type None"),
    "QALoRA": ({"use_qalora": True}, "use_qalora = True, a variant of LoRA that cnq does not merge"),
    "activated": ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens = \[1\]"),
    "stacked": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["experts.down"]}, "target_parameters"),
    "of tomorrow": ({"use_nextlora": {"x": 1}}, "use_nextlora"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model_for_weight_conversion"),
    "bias": ({"bias": "some"}, "bias is 'some', expected none, all or lora_only"),
    "rank: text": ({"r": "8"}, "r or rank_pattern is '8', expected a whole number"),
    "rank: none": ({"r": None}, "r or rank_pattern is 0"),
    "alpha: zero": ({"lora_alpha": 0}, "lora_alpha or alpha_pattern is 0"),
    "alpha: infinite": ({"lora_alpha": float("inf")}, "lora_alpha or alpha_pattern is inf"),
    "pattern: list": ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\], expected names and ranks"),
    "pattern: no expression": ({"alpha_pattern": {"(": 3}}, "expected a regular expression"),
    "flag: text": ({"use_rslora": "no"}, "use_rslora is 'no', expected true or false"),
    "targets: number": ({"target_modules": 3}, "target_modules is 3"),
    "tokens: text": ({"trainable_token_indices": ["x"]}, "trainable_token_indices"),
    "DoRA without lengths": ({"use_dora": True}, r"no lora_magnitude_vector, but the settings are of DoRA"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cnq_does_not_merge_by_are_refused(case, base, lora):
    changes, saying = SETTINGS[case]
    refused(saying, base, lora(**changes))


def test_what_is_no_adapter_is_told_apart(base, lora, tmp_path):
    refused("is no directory", base, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    refused("has no adapter's weights.*it holds nothing", base, tmp_path / "empty")
    refused("model.safetensors holds 21 tensors .*but no lora_A and lora_B: it is a model", base, base)
    checkpoint = lora("checkpoint-200/pt_lora_model").parent
    refused("trainer's checkpoint; the adapter lies inside it: give .*checkpoint-200/pt_lora_model", base, checkpoint)


def test_a_trainers_checkpoint_is_taken_with_what_its_settings_would_say(base, lora):
    """The whole model's state under a model's file name, the adapter's own name in its tensors' names, no settings."""
    path = lora()
    want = {name: tensor.data for name, tensor in merged(base, path).items()}
    state = {}
    for name, tensor in load_file(path / "adapter_model.safetensors").items():
        state[name.replace(".weight", ".default.weight")] = tensor
    for name, tensor in load_file(base / "model.safetensors").items():
        wrapped = (
            name.replace("proj.weight", "proj.base_layer.weight")
            if name.endswith(("q_proj.weight", "down_proj.weight"))
            else name
        )
        state[PREFIX + wrapped] = tensor.astype(np.float32)
    state[f"{PREFIX}model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8)
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_config.json").unlink()
    tiny.save(path / "model.safetensors", state, "F32")
    refused("model.safetensors but no adapter_config.json.*--lora-alpha A --lora-rank R", base, path)
    with pytest.raises(CheckpointError, match=r"by its rank expected \(4, columns\)"):
        read_adapter(path, alpha=16, rank=4)
    checkpoint = merge(open_checkpoint(base), [read_adapter(path, alpha=16, rank=8)]).checkpoint
    assert all(np.array_equal(checkpoint.read(name).data, data) for name, data in want.items())


def test_a_quantized_base_is_refused(wide_gguf, tmp_path):
    path = tiny_lora.adapter(tmp_path / "my-lora", wide_gguf.parent / "hf")
    q4 = quantize(wide_gguf, tmp_path / "q4.gguf", "Q4_K_M").path
    with pytest.raises(CheckpointError, match=r"q4.gguf is quantized .*Give the float model as base"):
        merge(open_checkpoint(q4), [read_adapter(path)])
    found, want = merged(wide_gguf, path), merged(wide_gguf.parent / "hf", path)
    assert all(np.array_equal(found[n].float32(), want[n].float32()) for n in want)


def test_what_float16_cannot_hold_is_refused_by_name(base, lora):
    path = changed(lora(), lambda t: {B0: 1e6 * t[B0]})
    with pytest.raises(GgufError, match=f"{Q0}.weight: .* is too large for F16.*bf16"):
        merged(base, path)
    assert np.isfinite(merged(base, path, dtype=BF16)[f"{Q0}.weight"].float32()).all()


def test_a_merge_that_changes_nothing_is_refused(base, lora, tmp_path):
    path = lora(size=1e-9)
    with pytest.raises(CheckpointError, match=r"the merge changes nothing: after my-lora all 4 tensors.*hardly trained"):
        convert(base, tmp_path / "out.gguf", loras=[path])
    assert not list(tmp_path.glob("out*"))
    changed(path, lambda t: {B0: 1e9 * t[B0]})
    (note,) = convert(base, tmp_path / "out.gguf", loras=[path]).notes
    assert "changes 3 tensors by less than their type can hold" in note
    assert "down_proj" in note


def test_every_adapter_says_how_much_it_changed(base, lora):
    paths = lora("one"), lora("two", targets=("v_proj",), rank=4)
    merging = merge(open_checkpoint(base), [read_adapter(path) for path in paths])
    for name in merging.checkpoint.entries:
        merging.checkpoint.read(name)
    one, two = merging.effects()
    assert (one.adapter, one.modules, one.whole, one.ranks, one.scales) == ("one", 4, 0, (8,), (2.0,))
    assert (two.adapter, two.modules, two.ranks, two.scales) == ("two", 2, (4,), (4.0,))
    ratios = {}
    for module in modules(base):
        a, b = matrices(paths[0], module)
        old = open_checkpoint(base).read(f"{module}.weight").float32()
        ratios[module] = np.linalg.norm(2 * b @ a) / np.linalg.norm(old)
    assert ratios[one.largest_in] == max(ratios.values()) == pytest.approx(one.largest, rel=1e-4)


# Where a model comes from


def test_a_merge_is_recorded_with_base_adapters_and_order(base, lora, tmp_path):
    paths = lora("one"), lora("two", rows=421)
    checkpoint = merge(open_checkpoint(base), [read_adapter(path) for path in paths]).checkpoint
    folder = write_hf(checkpoint, tmp_path / "out").path
    record = json.loads((folder / "cnq_merge.json").read_text())
    assert record["base"] == {"name": "my-base", "content_sha256": content_digest(open_checkpoint(base))}
    assert record["adapters"] == [
        {"name": path.name, "sha256": files.sha256(path / "adapter_model.safetensors"), "rank": 8, "alpha": 16}
        for path in paths
    ]
    fields = GgufFile(convert(folder, tmp_path / "out.gguf").path).fields
    assert json.loads(fields["cnq.merge"]) == record
    assert [fields[f"general.base_model.{i}.name"] for i in range(3)] == ["my-base", "one", "two"]
    assert json.loads((to_hf(tmp_path / "out.gguf", tmp_path / "back").path / "cnq_merge.json").read_text()) == record
    again = merge(open_checkpoint(folder), [read_adapter(lora("three"))]).checkpoint  # the chain goes on
    assert again.origin.planned["base"]["merge"] == record


def test_a_model_that_nothing_was_merged_into_says_nothing_of_it(base, tmp_path):
    fields = GgufFile(convert(base, tmp_path / "out.gguf").path).fields
    assert not [key for key in fields if "merge" in key or "base_model" in key]
    assert not (to_hf(tmp_path / "out.gguf", tmp_path / "back").path / "cnq_merge.json").exists()


@pytest.mark.parametrize("record", ['{"adapters": 3}', '{"base": {"name": ["x"]}, "adapters": [1, {"name": "\\ud800"}]}'])
def test_a_record_that_is_not_ours_does_no_harm(record, base, tmp_path):
    checkpoint = tiny.checkpoint(tmp_path / "model")
    (checkpoint / "cnq_merge.json").write_text(record)
    fields = GgufFile(convert(checkpoint, tmp_path / "out.gguf").path).fields
    assert json.loads(fields["cnq.merge"]) == json.loads(record)


def test_an_adapter_knows_its_base_by_content(base, lora, tmp_path):
    digest = content_digest(open_checkpoint(base))
    convert(base, tmp_path / "right.gguf", loras=[lora(cnq_base_digest=digest)])
    with pytest.raises(CheckpointError, match=f"content digest {'0' * 64}, .*my-base has {digest}: another base"):
        convert(base, tmp_path / "wrong.gguf", loras=[lora(cnq_base_digest="0" * 64)])
    assert not list(tmp_path.glob("wrong*"))


# On the way to a GGUF


@pytest.mark.parametrize("settings", [{"targets": tiny_lora.ALL}, {"rows": 421}], ids=["low rank", "resized"])
def test_converting_with_adapters_gives_the_bytes_of_the_merged_checkpoint(settings, base, lora, tmp_path):
    path = lora(**settings)
    straight = GgufFile(convert(base, tmp_path / "straight.gguf", loras=[path], dtype="f16").path)
    folder = write_hf(merge(open_checkpoint(base), [read_adapter(path)]).checkpoint, tmp_path / "merged").path
    by_way = GgufFile(convert(folder, tmp_path / "by-way.gguf", dtype="f16", name="my-lora").path)
    assert straight.tensors.keys() == by_way.tensors.keys()
    assert all(straight.tensor(n).data.tobytes() == by_way.tensor(n).data.tobytes() for n in straight.tensors)
    assert straight.fields == by_way.fields
    assert straight.fields["general.name"] == "my-lora"


# Memory


def test_a_merge_holds_one_tensor_and_its_change(tmp_path, monkeypatch):
    """Peak of what numpy allocates, in a model whose tensors are large against everything else."""
    monkeypatch.setitem(sys.modules, "torch", None)  # whose memory is not traced
    wide = tiny.checkpoint(tmp_path / "base", hidden_size=512, intermediate_size=2048, num_attention_heads=16)
    path = tiny_lora.adapter(tmp_path / "lora", wide, targets=tiny_lora.ALL)
    merging = merge(open_checkpoint(wide), [read_adapter(path)])
    largest = 512 * 2048
    assert 8 * largest <= merging.memory <= 9 * largest
    tracemalloc.start()
    for name in merging.checkpoint.entries:
        merging.checkpoint.read(name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    chunk = 12 << 20  # a few rows in float64, or while they are rounded
    assert peak <= merging.memory + chunk


def test_too_little_memory_is_said_before_the_work_starts(base, lora, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_memory", lambda: 10_000)
    with pytest.raises(NoSpace, match=r"of memory needed to merge into .*my-base, 10.0 kB free"):
        convert(base, tmp_path / "out.gguf", loras=[lora()])
    assert not list(tmp_path.glob("out*"))


def test_every_refusal_is_ours(base, lora):
    """Whatever stands in the settings, what comes out is a CnqError or a merge."""
    path = lora()
    config = json.loads((path / "adapter_config.json").read_text())
    for key in [*config, "rank_pattern", "alpha_pattern", "trainable_token_indices", "modules_to_save", "exclude_modules"]:
        for value in (None, 3, -1.5, True, "x", "(", [], ["x"], [3], {"x": 3}, {"x": [3]}, {"(": 3}, {"x": "y"}):
            (path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
            try:
                merged(base, path)
            except CnqError as error:
                assert str(path) in str(error), (key, value)


@pytest.mark.parametrize("rows", [1, 96, 127, 128, 129, 383, 421, 1024, 4099])
@pytest.mark.parametrize("columns", [64, 4096, 11008])
def test_a_product_by_blocks_of_rows_is_that_of_the_whole_to_the_bit(rows, columns):
    """On which merging by all cores, and PEFT's bits, depend."""
    blocks = arithmetic.row_blocks(rows, columns)
    assert [i for part in blocks for i in range(part.start, part.stop)] == list(range(rows))
    a, b = tiny_lora.values("a", (8, columns)), tiny_lora.values("b", (rows, 8))
    whole = arithmetic.product(b, a)
    assert all(np.array_equal(arithmetic.product(b[part], a), whole[part]) for part in blocks)

"""Runs of training on a tiny model: against a loop written by hand, resumed, stopped, continued, merged, converted."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
for extra in ("accelerate", "datasets", "deepspeed", "bitsandbytes", "tensorboard"):
    pytest.importorskip(extra)

import runs  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from cnq.convert import convert  # noqa: E402
from cnq.engine.model import Model  # noqa: E402
from cnq.errors import CheckpointError, OutputExists, RecipeError, TrainingError, VocabMismatch  # noqa: E402
from training import trainer as trainers  # noqa: E402
from training.blocks import blocks  # noqa: E402
from training.merge_lora import merge_lora  # noqa: E402
from training.sources import load_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers have much to say of what is tested here


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("base") / "base", dtype="F32")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory) -> Any:
    """Stage 2 with whole embeddings, dropout, and a checkpoint after each second step."""
    lora = {"modules_to_save": runs.EMBEDDINGS, "dropout": 0.1}
    keys = {
        "lora": lora,
        "max_steps": 6,
        "save_steps": 2,
        "eval_steps": 3,
        "save_total_limit": 9,
        "samples": ["人工", "A model"],
    }
    out = tmp_path_factory.mktemp("trained") / "out"
    return runs.run(runs.text_recipe(base, data, out, **keys))


def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors")


def model_of(base: Path, *adapters: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return model.eval()


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


TOKENS = np.random.default_rng(0).integers(3, 400, 50).tolist()


def test_the_loss_is_that_of_a_loop_written_by_hand(base, data, tmp_path):
    """Two rows a batch, two batches a step, one of them with the short last block: the mean is over the step's tokens."""
    keys = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", "max_grad_norm": 0.5}
    result = runs.run(runs.text_recipe(base, data, tmp_path / "out", **keys))

    made = blocks([data / "text"], load_tokenizer(base), block_size=32, cache=data / "cache", held_out=0.1, seed=42)
    rows = [row["input_ids"] for row in made.train]
    torch.manual_seed(42)
    config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                                "down_proj"])  # fmt: skip
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0)
    by_hand = []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 4)
        some = [torch.tensor(rows[4 * step + i]) for i in range(4)]
        nats = sum(cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum") for ids in some)
        loss = nats / sum(len(ids) - 1 for ids in some)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        by_hand.append(loss.item())
    assert runs.losses(result) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand[0] > by_hand[-1] + 0.05  # it learns

    model.eval()
    held_out = [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), row["bytes"]) for row in made.held_out]
    with torch.no_grad():
        nats = sum(
            cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="sum").item() for ids, labels, _ in held_out
        )
    n = sum(int((labels[1:] != -100).sum()) for _, labels, _ in held_out)
    assert result.held_out["loss"] == pytest.approx(nats / n, rel=1e-5)
    assert result.held_out["perplexity"] == pytest.approx(np.exp(nats / n), rel=1e-5)
    assert result.held_out["bits_per_byte"] == pytest.approx(nats / np.log(2) / sum(size for *_, size in held_out), rel=1e-5)


def test_a_resumed_run_has_the_identical_curve(trained, base, data, tmp_path):
    """Killed after step 4's checkpoint: steps 5 and 6, with dropout, and every number of the adapter, are the same bits."""
    out = tmp_path / "out"
    shutil.copytree(trained.path / "checkpoint-4", out / "checkpoint-4")
    (out / "checkpoint-5").mkdir()  # of which a kill -9 left nothing
    recipe = json.loads(trained.record.read_text())["recipe"]
    lora, arguments = recipe["lora"], recipe["arguments"]
    again = runs.run(
        runs.text_recipe(base, data, out, **arguments, lora=lora, samples=recipe["samples"], resume_from_checkpoint=True)
    )
    assert runs.losses(again) == runs.losses(trained)
    assert all(torch.equal(value, tensors(out)[name]) for name, value in tensors(trained.path).items())


def test_the_record_and_the_board_say_what_happened(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = json.loads(trained.record.read_text())
    assert record["recipe"]["lora"]["modules_to_save"] == runs.EMBEDDINGS
    assert len(record["base"]["content_sha256"]) == 64 and record["data"]["held_out_bytes"] > 0
    assert record["steps"] == 6 and record["held_out"] == trained.held_out
    board = EventAccumulator(str(trained.path / "runs"))
    board.Reload()
    assert len(board.Scalars("train/loss")) == 6
    assert [e.step for e in board.Scalars("eval/bits_per_byte")] == [3, 6]
    assert {"samples/人工/text_summary", "samples/A model/text_summary"} <= set(board.Tags()["tensors"])


def test_an_adapter_computes_the_same_merged_and_in_llama_cpp(trained, base, tmp_path):
    """Logits of base + adapter in transformers, of the merged checkpoint there, and of its GGUF: max |Δ| < 1e-3."""
    want = logits_of(model_of(base, trained.path), TOKENS)
    assert np.abs(want - logits_of(model_of(base), TOKENS)).max() > 0.5
    merge_lora(base, [trained.path], tmp_path / "merged")
    assert np.abs(logits_of(model_of(tmp_path / "merged"), TOKENS) - want).max() < 1e-4
    converted = convert(tmp_path / "merged", tmp_path / "merged.gguf", dtype="f32")
    with Model(converted.path, n_ctx=64, exact=True) as model:
        assert np.abs(model.logits(TOKENS) - want).max() < 1e-3


@pytest.mark.parametrize("saved", [[], runs.EMBEDDINGS])
def test_a_head_that_shares_the_embeddings_rows_goes_on_sharing_them(data, tmp_path, saved):
    base = tiny.checkpoint(tmp_path / "base", dtype="F32", tie_word_embeddings=True)
    result = runs.run(runs.text_recipe(base, data, tmp_path / "out", lora={"modules_to_save": saved}))
    merge_lora(base, [result.path], tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is True
    want = logits_of(model_of(base, result.path), TOKENS)
    assert np.abs(logits_of(model_of(tmp_path / "merged"), TOKENS) - want).max() < 1e-4
    again = runs.run(runs.text_recipe(base, data, tmp_path / "again", adapter=str(result.path), max_steps=1))
    assert runs.losses(again)[0] < runs.losses(result)[0]


def test_bf16_trains_float32_weights(base, data, tmp_path):
    """Mixed precision: the base in bf16, what is trained in float32; the sample is computed outside the Trainer's autocast."""
    keys = {"dtype": "bf16", "lora": {"modules_to_save": runs.EMBEDDINGS}, "samples": ["人工"], "max_steps": 6}
    result = runs.run(runs.text_recipe(base, data, tmp_path / "out", **keys))
    assert {t.dtype for t in tensors(result.path).values()} == {torch.float32}
    assert runs.losses(result)[-1] < runs.losses(result)[0] - 0.1


def test_a_stream_is_trained_as_a_file_is(base, data, tmp_path):
    keys = {"train_sampling_strategy": "sequential", "max_steps": 3}
    whole = runs.run(runs.text_recipe(base, data, tmp_path / "whole", **keys))
    stream = runs.run(runs.text_recipe(base, data, tmp_path / "stream", **keys, streaming=True))
    assert runs.losses(stream) == pytest.approx(runs.losses(whole), rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_a_stage_trains(stage, base, data, tmp_path):
    lora = {"modules_to_save": runs.EMBEDDINGS} if stage == 2 else None
    result = runs.run(runs.text_recipe(base, data, tmp_path / "out", stage=stage, lora=lora, max_steps=2))
    found = tensors(result.path)
    whole = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert whole <= set(found)
    assert len(found) == (2 if stage == 1 else 2 + 2 * 7 * 2)
    assert result.plan.trained == sum(t.numel() for t in found.values())
    merge_lora(base, [result.path], tmp_path / "merged")
    want = logits_of(model_of(base, result.path), TOKENS)
    assert np.abs(logits_of(model_of(tmp_path / "merged"), TOKENS) - want).max() < 1e-4
    assert np.abs(want - logits_of(model_of(base), TOKENS)).max() > 0.05


def test_an_adapter_is_trained_further(trained, base, data, tmp_path):
    """The seeds' continued adapter stayed as it was: peft loads one frozen unless told otherwise."""
    result = runs.run(runs.sft_recipe(base, data, tmp_path / "out", adapter=str(trained.path), packing=True, max_steps=2))
    before, after = tensors(trained.path), tensors(result.path)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert runs.losses(result)[0] < 6  # from where it was, not from the beginning


def test_an_adapter_of_another_base_is_refused(trained, data, tmp_path):
    other = tiny.checkpoint(tmp_path / "other", dtype="F16")
    with pytest.raises(CheckpointError, match="another base, though of the same shapes"):
        runs.run(runs.text_recipe(other, data, tmp_path / "out", adapter=str(trained.path)))


def test_a_damaged_adapter_is_refused(trained, base, data, tmp_path):
    """One that lacks what its config says was trained: PEFT itself only warns."""
    broken = tmp_path / "broken"
    broken.mkdir()
    kept = {n: t for n, t in tensors(trained.path).items() if "layers.1.mlp.up_proj" not in n}
    save_file(kept, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(trained.path / "adapter_config.json", broken)
    with pytest.raises(CheckpointError, match="lacks 2 of the 30 tensors"):
        runs.run(runs.text_recipe(base, data, tmp_path / "out", adapter=str(broken)))


def test_outputs_are_kept(trained, base, data, tmp_path):
    with pytest.raises(OutputExists, match="holds an adapter"):
        runs.run(runs.text_recipe(base, data, trained.path))
    shutil.copytree(trained.path / "checkpoint-4", tmp_path / "out/checkpoint-4")
    with pytest.raises(OutputExists, match="checkpoints of a run, the last at step 4"):
        runs.run(runs.text_recipe(base, data, tmp_path / "out"))


def test_a_longer_tokenizer_grows_rows_that_are_the_mean_of_their_parts(base, data, tmp_path):
    longer = tmp_path / "longer"
    tiny.checkpoint(longer, vocab="spm-added")  # four tokens more
    with pytest.raises(RecipeError, match=r"has 4 tokens that .* no rows for.*modules_to_save"):
        runs.run(runs.text_recipe(base, data, tmp_path / "out", tokenizer=str(longer)))
    keys = {"tokenizer": str(longer), "lora": {"modules_to_save": runs.EMBEDDINGS}}
    result = runs.run(runs.text_recipe(base, data, tmp_path / "out", **keys, learning_rate=1e-9))
    rows = tensors(result.path)["base_model.model.model.embed_tokens.weight"]
    old = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    own = load_tokenizer(base)
    parts = own.encode("量化", add_special_tokens=False)
    parts = parts[1:] if own.convert_ids_to_tokens(parts[0]) == "▁" else parts
    assert rows.shape[0] == 424
    assert torch.allclose(rows[:420], old, atol=1e-6) and torch.allclose(rows[423], old[parts].mean(0), atol=1e-6)
    merge_lora(base, [result.path], tmp_path / "merged")
    assert len(load_tokenizer(tmp_path / "merged")) == 424


def test_a_tokenizer_that_does_not_fit_is_refused(base, data, tmp_path):
    longer = tiny.checkpoint(tmp_path / "longer", vocab="spm-added", dtype="F32")
    mixed = tmp_path / "mixed"
    shutil.copytree(base, mixed)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(longer / name, mixed)
    with pytest.raises(VocabMismatch, match="say so: tokenizer="):
        runs.run(runs.text_recipe(mixed, data, tmp_path / "out"))
    other = tiny.checkpoint(tmp_path / "other", vocab="llama-bpe")
    with pytest.raises(VocabMismatch, match="does not begin with the tokens of"):
        runs.run(runs.text_recipe(base, data, tmp_path / "out", tokenizer=str(other)))


def test_ggufs_and_other_layouts_are_refused(gguf, data, tmp_path):
    with pytest.raises(CheckpointError, match=r"is a GGUF.*cnq to-hf"):
        runs.run(runs.text_recipe(gguf(), data, tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"7b-plus is a base with 2 adapters.*training\.merge_lora 7b-plus"):
        runs.run(runs.text_recipe(Path("7b-plus"), data, tmp_path / "out"))


def test_what_the_trainer_refuses_is_said(base, data, tmp_path):
    with pytest.raises(RecipeError, match="the Trainer refuses the recipe: adam is not a valid OptimizerNames"):
        runs.run(runs.text_recipe(base, data, tmp_path / "out", optim="adam"))


def test_a_loss_that_is_no_number_stops_the_run_with_its_batch(base, data, tmp_path):
    """Row 7 of the embedding is NaN: the batch in the file is the first that has token 7 in it."""
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = load_file(broken / "model.safetensors")
    token = load_tokenizer(base).encode("2 The", add_special_tokens=False)[1]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d.*rank0-bad_batch.pt"):
        runs.run(runs.text_recipe(broken, data, tmp_path / "out", max_steps=20))
    batch = torch.load(tmp_path / "out/rank0-bad_batch.pt")
    assert (batch["batch"]["input_ids"] == token).any()
    assert not (tmp_path / "out/adapter_config.json").exists()


@pytest.mark.parametrize(("kept", "n"), [("layers.9", 0), ("layers.1", 14)])
def test_an_adapter_that_was_not_saved_whole_stops_the_run(base, data, tmp_path, monkeypatch, kept, n):
    """The seeds' bug: PEFT filtered what had been filtered already, and a file of 443 bytes was left of the training."""
    whole = peft.PeftModel.save_pretrained

    def partly(self: Any, folder: Any, state_dict: Any = None, **options: Any) -> Any:
        return whole(self, folder, state_dict={k: v for k, v in state_dict.items() if kept in k}, **options)

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", partly)
    with pytest.raises(TrainingError, match=rf"bytes\) holds {n} tensors, 28 were trained"):
        runs.run(runs.text_recipe(base, data, tmp_path / "out", max_steps=2))
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_an_adapter_that_learned_nothing_is_not_put_in_place(base, data, tmp_path):
    with pytest.raises(TrainingError, match=r"all zeros.*learning_rate 0"):
        runs.run(runs.text_recipe(base, data, tmp_path / "out", learning_rate=0.0))
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_out_of_memory_says_which_knob_to_turn(base, data, tmp_path, monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainers.Trainer, "training_step", full)
    with pytest.raises(
        TrainingError, match=r"per_device_train_batch_size=1 gradient_accumulation_steps=2.*block_size=16.*load_in"
    ):
        runs.run(runs.text_recipe(base, data, tmp_path / "out"))


def test_sigterm_saves_a_checkpoint_that_the_run_goes_on_from(base, data, tmp_path):
    """In a process of its own, killed while it trains."""
    recipe = runs.text_recipe(base, data, tmp_path / "out", max_steps=100000, resume_from_checkpoint=True)
    process = runs.spawn(runs.ALONE, runs.written(recipe, tmp_path / "recipe.yaml"))
    board = tmp_path / "out/runs"
    deadline = time.monotonic() + 100
    while not list(board.glob("*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM after step" in said and "Traceback" not in said
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert step > 0
    result = runs.run(runs.text_recipe(base, data, tmp_path / "out", max_steps=step + 1, resume_from_checkpoint=True))
    assert result.steps == step + 1

"""Two processes under DeepSpeed, over gloo: the losses, the measures and the adapter of one process."""

import json
from pathlib import Path

import pytest
import tiny

torch = pytest.importorskip("torch")
for extra in ("peft", "transformers", "accelerate", "datasets", "deepspeed", "bitsandbytes", "tensorboard"):
    pytest.importorskip(extra)

import runs  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


STAGES = ("zero2", "zero3")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, Path]:
    """alone, zero2, zero3 -> the output of the same recipe in one process, and in two.

    The tokenizer has four tokens more than the base: the embedding grows, and is trained whole.
    """
    folder = tmp_path_factory.mktemp("deepspeed")
    base, data = tiny.checkpoint(folder / "base", dtype="F32"), runs.corpus(folder / "data")
    longer = tiny.checkpoint(folder / "longer", vocab="spm-added")
    lora = {"modules_to_save": runs.EMBEDDINGS, "dropout": 0.0}
    keys = {"tokenizer": str(longer), "lora": lora, "samples": ["人工"], "eval_steps": 2, "optim": "adamw_torch"}
    runs.run(runs.text_recipe(base, data, folder / "alone", gradient_accumulation_steps=2, **keys))
    recipes = [
        runs.written(runs.text_recipe(base, data, folder / stage, deepspeed=stage, **keys), folder / f"{stage}.yaml")
        for stage in STAGES
    ]
    process = runs.spawn(runs.IN_TWO, *recipes)
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return {name: folder / name for name in ("alone", *STAGES)}


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(outputs, stage):
    """Losses, measures and the adapter: under ZeRO-3 its embedding lay in parts, and is saved in one."""
    alone, two = (json.loads((outputs[name] / "training.json").read_text()) for name in ("alone", stage))
    curves = [[log["loss"] for log in record["history"] if "loss" in log] for record in (two, alone)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and len(curves[0]) == 4
    assert two["held_out"] == pytest.approx(alone["held_out"], rel=1e-4)
    assert two["plan"]["world"] == 2 and two["plan"]["tokens_per_step"] == alone["plan"]["tokens_per_step"]
    ours, theirs = (load_file(outputs[name] / "adapter_model.safetensors") for name in (stage, "alone"))
    assert {name: tuple(t.shape) for name, t in ours.items()} == {name: tuple(t.shape) for name, t in theirs.items()}
    assert ours["base_model.model.lm_head.weight"].shape[0] == 424
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-3

"""Training on weights of 4 and 8 bits, with bitsandbytes on a CPU."""

import json
from pathlib import Path

import pytest
import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
for extra in ("accelerate", "datasets", "deepspeed", "bitsandbytes", "tensorboard"):
    pytest.importorskip(extra)

import runs  # noqa: E402
from bitsandbytes.nn import Linear4bit, Linear8bitLt  # noqa: E402

from training.merge_lora import merge_lora  # noqa: E402
from training.model import load_base  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("kbits", "kind"), [(4, Linear4bit), (8, Linear8bitLt)])
def test_a_quantized_base_trains_saves_and_reloads(kbits, kind, tmp_path):
    base, data = tiny.checkpoint(tmp_path / "base", dtype="F32", intermediate_size=128), runs.corpus(tmp_path / "data")
    keys = {"load_in_kbits": kbits, "lora": {"modules_to_save": runs.EMBEDDINGS}, "max_steps": 8}
    recipe = runs.sft_recipe(base, data, tmp_path / "out", **keys)
    result = runs.run(recipe)
    curve = runs.losses(result)
    assert curve[-1] < curve[0] - 0.5

    quantized = load_base(recipe, base, torch.device("cpu"))
    kinds = {type(module) for name, module in quantized.named_modules() if name.endswith("_proj")}
    assert kinds == {kind} and type(quantized.lm_head) is torch.nn.Linear
    again = peft.PeftModel.from_pretrained(quantized, tmp_path / "out").eval()
    rows = _held_out(recipe)
    with torch.no_grad():
        losses = [again(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item() for row in rows]
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    mean = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(result.held_out["loss"], rel=1e-4)
    merge_lora(base, [result.path], tmp_path / "merged")  # into the float base
    assert json.loads((tmp_path / "merged/cnq_merge.json").read_text())["adapters"][0]["rank"] == 8


def _held_out(recipe) -> list[dict]:
    from cnq.prompts import named
    from training.examples import examples
    from training.sources import load_tokenizer

    made = examples(
        [Path(recipe.data[0])], load_tokenizer(Path(recipe.base)), named("llama-2"), max_length=recipe.max_length,
        cache=recipe.cache, held_out=recipe.held_out, seed=42,
    )  # fmt: skip
    return list(made.held_out)

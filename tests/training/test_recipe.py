"""Recipes: what they may say, and what is said to one that is wrong."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from click.testing import CliRunner

from cnq.errors import RecipeError
from training.pretrain import main
from training.recipe import HERE, Pretraining, Tuning, read_recipe, recipe_of

LEAST = {"base": "b", "data": "d", "output": "o"}
CONFIGS = sorted((HERE / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_that_comes_along_is_one(path):
    kind = Pretraining if path.stem.startswith("pretrain") else Tuning
    recipe = read_recipe(kind, Path(path.name))  # found beside the package, wherever one is
    assert {"learning_rate", "num_train_epochs"} <= set(recipe.arguments)
    assert recipe.trainer_arguments()["eval_strategy"] == "steps"


def test_the_numbers_are_those_of_the_systems_they_name():
    """(r, alpha, learning rate, tokens of a row, rows of a step)."""

    def numbers(name: str) -> tuple:
        recipe = read_recipe(Pretraining if name.startswith("pre") else Tuning, Path(f"configs/{name}.yaml"))
        rows = recipe.argument("per_device_train_batch_size") * recipe.argument("gradient_accumulation_steps")
        return recipe.lora.r, recipe.lora.alpha, recipe.argument("learning_rate"), recipe.length, rows

    assert {path.stem: numbers(path.stem) for path in CONFIGS} == {
        "pretrain_llama_7b": (8, 32, 2e-4, 512, 8), "pretrain_llama_13b": (8, 32, 2e-4, 512, 8),
        "pretrain_llama2_7b": (64, 128, 2e-4, 512, 8), "pretrain_llama3_8b": (64, 128, 1e-4, 1024, 8),
        "sft_llama_7b": (8, 32, 1e-4, 512, 8), "sft_llama_13b": (8, 32, 1e-4, 512, 8),
        "sft_llama2_7b": (64, 128, 1e-4, 512, 8), "sft_llama3_8b": (64, 128, 1e-4, 512, 8),
        "qlora_65b": (64, 16, 1e-4, 2048, 32), "sft_11gb": (8, 16, 3e-4, 256, 128),
    }  # fmt: skip


def test_the_command_line_is_laid_over_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: b\ndata: [a, b]\noutput: o\nlora: {r: 4}\n", encoding="utf-8")
    given = [
        "lora.r=16",
        "lora.modules_to_save=[embed_tokens]",
        "learning_rate=3e-5",
        "neftune_noise_alpha=5",
        "data=c",
        "stage=1",
    ]
    recipe = read_recipe(Pretraining, path, given)
    assert recipe.lora.r == 16 and recipe.lora.modules_to_save == ("embed_tokens",) and recipe.data == ("c",)
    assert recipe.arguments == {"learning_rate": 3e-5, "neftune_noise_alpha": 5.0}
    assert recipe.trainer_arguments()["bf16"] is True


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"learning_rat": 1e-4}, "no key learning_rat. Did you mean learning_rate?"),
        ({"maxlength": 512}, "no key maxlength. Did you mean max_length?"),
        ({"block_size": 512}, "no key block_size"),
        ({"lora": {"rank": 8}}, "no key lora.rank"),
        ({"lora": {"r": 0}}, "lora.r=0: input should be greater than or equal to 1"),
        ({"load_in_kbits": 5}, "load_in_kbits=5: input should be 16, 8 or 4"),
        ({"learning_rate": "fast"}, "learning_rate=fast: input should be a valid number"),
        ({"bf16": True}, "the recipe's key is dtype"),
        ({"logging_nan_inf_filter": True}, "cnq sets it"),
        ({"deepspeed": "zero4"}, "not one of zero2, zero2_offload, zero3, zero3_offload"),
        ({"deepspeed": "zero3", "load_in_kbits": 4}, "Take zero2"),
        ({"data": []}, "data="),
    ],
)
def test_a_wrong_recipe_is_told_what_is_wrong(keys, said):
    with pytest.raises(RecipeError) as error:
        recipe_of(Tuning, LEAST | keys)
    assert said in str(error.value)


def test_what_is_missing_and_what_needs_another_key_is_said():
    with pytest.raises(RecipeError, match="output is missing"):
        recipe_of(Tuning, {"base": "b", "data": "d"})
    with pytest.raises(RecipeError, match="streaming needs max_steps"):
        recipe_of(Pretraining, LEAST | {"streaming": True})


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("base: [", [], "is no YAML"),
        ("just words", [], "holds no `key: value` lines"),
        ("base: b", ["lora.r"], "'lora.r' is no key=value"),
        ("base: b", ["base.x=1"], "base is no group of keys"),
    ],
)
def test_a_command_with_a_wrong_recipe_ends_in_one_line(text, overrides, said, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(main, [str(path), *overrides])
    assert result.exit_code == 1 and said in result.output and result.output.count("\n") == 1


def test_a_recipe_that_is_not_there_names_those_that_are():
    result = CliRunner().invoke(main, ["configs/none.yaml"])
    assert result.exit_code == 1 and "pretrain_llama2_7b.yaml" in result.output

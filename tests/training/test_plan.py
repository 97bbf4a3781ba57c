"""What a recipe says before it starts: its numbers of parameters are the model's, its activations those that autograd keeps."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from training.model import adapter_config, n_parameters  # noqa: E402
from training.plan import activations, plan  # noqa: E402
from training.recipe import EMBEDDINGS, LINEAR, Recipe, Tuning, recipe_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": 2}


def tuning(**keys: Any) -> Recipe:
    return recipe_of(Tuning, {"base": "b", "data": "d", "output": "o", "max_length": 64, "dtype": "fp32"} | keys)


def config(**keys: Any) -> Any:
    return transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 2} | keys)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [[], list(EMBEDDINGS)])
def test_parameters_are_counted_as_the_model_has_them(tied, saved):
    recipe = tuning(lora={"modules_to_save": saved})
    lora = adapter_config(recipe, tied, None)
    model = transformers.LlamaForCausalLM(config(tie_word_embeddings=tied, vocab_size=510))
    adapted = peft.get_peft_model(model, lora)
    trained, _ = adapted.get_nb_trainable_parameters()
    found = plan(recipe, config(tie_word_embeddings=tied), lora, 510, 100, 1)
    assert found.trained == trained == n_parameters(p for p in adapted.parameters() if p.requires_grad)
    frozen_and_trained = {name.replace("original_module.", "").replace("modules_to_save.default.", ""): p.numel()
                          for name, p in adapted.named_parameters()}  # fmt: skip
    assert found.parameters == sum(frozen_and_trained.values())


def test_steps_are_those_of_the_trainer():
    keys = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "num_train_epochs": 2}
    recipe = tuning(**keys)
    lora = adapter_config(recipe, False, None)
    steps = [plan(recipe, config(), lora, 500, n, world).steps for n, world in ((24, 1), (25, 1), (25, 2), (None, 1))]
    assert steps == [4, 6, 4, None]  # 24: 8 batches; 25: 9; of two processes 5 each


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], list(LINEAR)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_layers_activations_are_those_that_autograd_keeps(dtype, targets, checkpointed):
    """Bytes of the tensors saved for the backward pass, two layers against six: a layer's share within 12 %."""
    recipe = tuning(dtype=dtype, lora={"targets": targets}, gradient_checkpointing=checkpointed, per_device_train_batch_size=2)
    lora = adapter_config(recipe, False, None)
    kept, said = (
        [f(config(num_hidden_layers=layers)) for layers in (2, 6)]
        for f in (lambda c: _kept(c, lora, recipe), lambda c: activations(recipe, c, lora))
    )
    assert (kept[1] - kept[0]) == pytest.approx(said[1] - said[0], rel=0.12)


def _kept(shape: Any, lora: Any, recipe: Recipe) -> int:
    dtype = torch.bfloat16 if recipe.dtype == "bf16" else torch.float32
    model = transformers.LlamaForCausalLM(shape).to(dtype).requires_grad_(False)
    model = peft.get_peft_model(model, lora).train()
    model.enable_input_require_grads()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that its address is not given to another
        return tensor

    ids = torch.randint(0, 500, (2, recipe.length))
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in kept.values())


def test_zero_shares_out_and_offload_moves():
    shape, lora = config(), adapter_config(tuning(), False, None)

    def memory(**keys: Any) -> Any:
        return plan(tuning(**keys), shape, lora, 500, 100, 4).memory

    plain, two, three = memory(dtype="bf16"), memory(dtype="bf16", deepspeed="zero2"), memory(dtype="bf16", deepspeed="zero3")
    assert two.weights <= plain.weights and three.weights == two.weights / 4
    assert two.gradients == plain.gradients / 8 and two.optimizer == plain.optimizer * 12 / 8 / 4
    offloaded = memory(dtype="bf16", deepspeed="zero3_offload")
    assert offloaded.weights == offloaded.optimizer == 0
    assert offloaded.host == pytest.approx(4 * (three.weights + three.optimizer))


def test_the_package_has_the_recipes_that_it_names():
    configs = Path(__file__).parents[2] / "training/configs"
    assert {p.stem for p in (configs / "deepspeed").glob("*.json")} == {"zero2", "zero2_offload", "zero3", "zero3_offload"}

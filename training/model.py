"""The model of a recipe: the base in its precision, rows for new tokens, and what is trained on top of it, with PEFT."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cnq.adapters.settings import NO_TARGETS
from cnq.errors import CheckpointError, TrainingError, listed

from .recipe import EMBEDDINGS, Pretraining, Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_base(recipe: Recipe, folder: Path, device: torch.device) -> Any:
    """The base model, frozen, on its device; under ZeRO-3 in parts. TrainingArguments have to be there before it.

    Raises TrainingError (out of memory), CheckpointError.
    """
    dtype = DTYPES[recipe.dtype]
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": recipe.attention, "trust_remote_code": False}
    if recipe.load_in_kbits != 16:
        options["quantization_config"] = _quantization(recipe, dtype)
    if recipe.device_map:
        options["device_map"] = recipe.device_map
    elif recipe.load_in_kbits != 16:
        options["device_map"] = {"": device}
    with explaining_memory(recipe):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise CheckpointError(f"{folder} could not be loaded: {reason}.") from error
    if recipe.load_in_kbits != 16:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer does that
    return model.requires_grad_(False)


def _quantization(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What is trained whole stays in full precision, and so does the head, whose rounding costs most."""
    kept = sorted({*recipe.whole, "lm_head"})
    if recipe.load_in_kbits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )  # fmt: skip


def grow(model: Any, parts: Sequence[Sequence[int]]) -> None:
    """Give embedding and head a row for each new token: the mean of the rows of the old tokens that its text is cut into.

    parts: for each new token these old ones. Means are made in float32; old rows keep every bit. Right under ZeRO-3 too.
    """
    old = model.config.vocab_size
    model.resize_token_embeddings(old + len(parts), mean_resizing=False)
    weights = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in weights.values():  # one, if they are tied
        with whole(weight, write=True), torch.no_grad():
            for row, ids in enumerate(parts, old):
                weight[row] = weight[list(ids)].float().mean(0).to(weight.dtype)
    model.requires_grad_(False)


def adapter_config(recipe: Recipe, tied: bool, adapter: Path | None) -> peft.LoraConfig:
    """Of the adapter that goes on, else of the recipe's.

    tied: the head shares the embedding's rows; they stay one matrix then, also when they are trained.
    """
    if adapter:
        return peft.LoraConfig.from_pretrained(str(adapter))
    saved = [name for name in recipe.whole if not (tied and name == "lm_head" and "embed_tokens" in recipe.whole)]
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "modules_to_save": saved or None,
        "ensure_weight_tying": tied and "embed_tokens" in saved,
    }
    lora = recipe.lora
    if lora is None or (isinstance(recipe, Pretraining) and recipe.stage == 1):
        return peft.LoraConfig(target_modules=NO_TARGETS, **common)
    targets = list(lora.targets) if lora.targets != ("all-linear",) else "all-linear"
    return peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none", **common
    )


def with_adapter(model: Any, recipe: Recipe, adapter: Path | None) -> Any:
    """The model with what is trained: a new adapter, or one that is trained further.

    What is trained is float32, so that small steps are not rounded away; DeepSpeed keeps such a copy by itself.
    Raises CheckpointError when the adapter does not fit the model.
    """
    if adapter is None:
        model = peft.get_peft_model(model, adapter_config(recipe, bool(model.config.tie_word_embeddings), None))
    else:
        model = _continued(model, adapter)
    if not recipe.deepspeed:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    model.enable_input_require_grads()  # else nothing reaches the adapters through checkpointed layers
    return model


def _continued(model: Any, adapter: Path) -> Any:
    try:
        model = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"{adapter} does not fit {model.name_or_path}: {reason}. Give the base it was trained on."
        ) from error
    stored = set(peft.utils.load_peft_weights(str(adapter), device="cpu"))
    wanted = {saved_name(name) for name, _ in trained(model)}
    if missing := sorted(wanted - stored):
        raise CheckpointError(
            f"{adapter} lacks {len(missing)} of the {len(wanted)} tensors that it says were trained: {listed(missing, 2)}. "
            "It was not saved whole: take an earlier checkpoint."
        )
    return model


def trained(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, a parameter that two modules share by both its names, as PEFT saves it."""
    return ((name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)


def saved_name(name: str) -> str:
    """What PEFT calls a parameter of the adapter "default" in its file."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


@contextmanager
def whole(*parameters: nn.Parameter, write: bool = False) -> Iterator[None]:
    """Under ZeRO-3, have parameters whole on every rank; write: what rank 0 makes of them goes to the others."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


def trained_tensors(model: Any, keep: bool) -> dict[str, torch.Tensor]:
    """What was trained, whole, on the CPU, by its name in the model: one parameter at a time. keep: on this rank."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    for name, parameter in trained(model):
        first = names.setdefault(id(parameter), name)
        with whole(parameter):
            if keep:
                tensors[name] = tensors[first] if first != name else parameter.detach().cpu().clone()
    return tensors


def n_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Under ZeRO-3 of the whole, and of 4-bit matrices the numbers, not the bytes they are packed in."""
    total = 0
    for p in parameters:
        packed = getattr(p, "quant_state", None)
        total += getattr(p, "ds_numel", None) or (packed.shape.numel() if packed is not None else p.numel())
    return total


@contextmanager
def explaining_memory(recipe: Recipe) -> Iterator[None]:
    """Out of memory becomes a TrainingError that says which knob to turn."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError(f"out of memory. {_knobs(recipe)}") from error
    except RuntimeError as error:
        if not any(text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory")):
            raise
        raise TrainingError(f"out of memory. {_knobs(recipe)}") from error


def _knobs(recipe: Recipe) -> str:
    """What to change, the cheapest first, as far as it is not done yet."""
    length = "block_size" if isinstance(recipe, Pretraining) else "max_length"
    batch = recipe.argument("per_device_train_batch_size")
    steps = recipe.argument("gradient_accumulation_steps")
    halves = f"per_device_train_batch_size={batch // 2} gradient_accumulation_steps={steps * 2} (the same steps)"
    fewer = {16: 8, 8: 4, 4: 4}[recipe.load_in_kbits]
    knobs = [
        halves if batch > 1 else "",
        "gradient_checkpointing=true" if not recipe.gradient_checkpointing else "",
        f"{length}={recipe.length // 2}",
        f"load_in_kbits={fewer}" if fewer != recipe.load_in_kbits and "zero3" not in (recipe.deepspeed or "") else "",
        "optim=paged_adamw_8bit" if "8bit" not in str(recipe.argument("optim")) and not recipe.deepspeed else "",
        "lora.modules_to_save=[]" if set(recipe.whole) & set(EMBEDDINGS) and not isinstance(recipe, Pretraining) else "",
        "deepspeed=zero3_offload" if recipe.deepspeed != "zero3_offload" and recipe.load_in_kbits == 16 else "",
    ]
    return f"Turn one of these, in this order: {'; '.join(knob for knob in knobs if knob)}."

"""A recipe: what to train from what, as a YAML file and `key=value` on the command line, checked before anything is loaded.

Keys are those of the classes below, and every argument of transformers' Trainer (learning_rate, optim, neftune_noise_alpha, …),
which goes through to it as it is.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cnq.errors import RecipeError, listed

HERE = Path(__file__).parent
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "lm_head")

Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class Lora(BaseModel):
    """r: rank; the change is alpha / r times the product. targets: ends of the names of linear layers.

    modules_to_save: trained whole, and saved whole: with a new vocabulary embed_tokens and lm_head.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    r: int = Field(default=8, ge=1)
    alpha: int = Field(default=32, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: Names = Field(default=LINEAR, min_length=1)
    modules_to_save: Names = ()


class Recipe(BaseModel):
    """base: a Hugging Face directory, a hub id or a name from `cnq models`. data: files or folders. output: where the adapter
    goes.

    tokenizer: when it is not the base's (nor the adapter's): the base grows rows for what it has more.
    adapter: to be trained further; its own settings hold, not `lora`. held_out: share of the data that is only measured.
    load_in_kbits: 8 and 4 (nf4, double quantization) with bitsandbytes. dtype: of computing; what is trained is float32.
    gradient_checkpointing: what layers compute is computed again instead of kept.
    device_map: auto = the layers of one process shared out among its GPUs. deepspeed: a name in configs/deepspeed, or a file.
    resume_from_checkpoint: true = the last one in `output`, or from the beginning where there is none.
    cache: folder for the tokenized data. samples: prompts that the model answers at each evaluation, in sample_tokens.
    arguments: of transformers' Trainer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: str
    data: Names = Field(min_length=1)
    output: Path
    tokenizer: str | None = None
    adapter: str | None = None
    lora: Lora | None = Lora()
    held_out: float = Field(default=0.001, ge=0, lt=1)
    load_in_kbits: Literal[16, 8, 4] = 16
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    gradient_checkpointing: bool = True
    device_map: Literal["auto"] | None = None
    deepspeed: str | None = None
    cache: Path | None = None
    resume_from_checkpoint: bool | str = False
    samples: Names = ()
    sample_tokens: int = Field(default=64, ge=1)
    arguments: dict[str, Any] = {}

    @model_validator(mode="after")
    def _together(self) -> "Recipe":
        if self.deepspeed:
            _deepspeed(self.deepspeed)
        if self.load_in_kbits != 16 and self.deepspeed and "zero3" in self.deepspeed:
            raise ValueError("load_in_kbits=8 or 4 and zero3: DeepSpeed cannot share out quantized weights. Take zero2")
        if self.device_map and self.deepspeed:
            raise ValueError("device_map=auto is for one process, deepspeed for one a GPU. Leave one of them out")
        return self

    @property
    def length(self) -> int:
        """Tokens of a row."""
        raise NotImplementedError

    def argument(self, name: str) -> Any:
        """An argument of the Trainer, or its default."""
        return self.arguments.get(name, _DEFAULTS.get(name, _trainer_arguments()[name][1]))

    def trainer_arguments(self) -> dict[str, Any]:
        """For TrainingArguments, but for output_dir."""
        how = "steps" if "eval_steps" in self.arguments else "epoch"
        given: dict[str, Any] = _DEFAULTS | {"eval_strategy": how if self.held_out else "no"} | self.arguments
        if self.gradient_checkpointing:
            given |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
        if self.deepspeed:
            given["deepspeed"] = str(_deepspeed(self.deepspeed))
        return given | {self.dtype: True} if self.dtype != "fp32" else given

    @property
    def whole(self) -> tuple[str, ...]:
        """What is trained whole."""
        return self.lora.modules_to_save if self.lora else ()


class Pretraining(Recipe):
    """stage 1: the embeddings only, everything else frozen; 2: LoRA, and the embeddings whole.

    documents: one a line, a paragraph (up to a blank line) or a file. streaming: for texts larger than the memory, tokenized
    on the way.
    """

    stage: Literal[1, 2] = 2
    block_size: int = Field(default=512, ge=2)
    documents: Literal["line", "paragraph", "file"] = "line"
    streaming: bool = False

    @model_validator(mode="after")
    def _steps_are_known(self) -> "Pretraining":
        if self.streaming and self.arguments.get("max_steps", -1) <= 0:
            raise ValueError("streaming needs max_steps: how many there are is not known before")
        return self

    @property
    def length(self) -> int:
        return self.block_size

    @property
    def whole(self) -> tuple[str, ...]:
        return EMBEDDINGS if self.stage == 1 else super().whole


class Tuning(Recipe):
    """format: of the prompts, as for `cnq chat`; None = the tokenizer's own chat template.

    too_long: cut = the prompt's beginning goes; drop = the example goes. packing: several examples in one row, which do not see
    each other.
    """

    format: str | None = None
    max_length: int = Field(default=512, ge=8)
    too_long: Literal["cut", "drop"] = "cut"
    packing: bool = False

    @property
    def length(self) -> int:
        return self.max_length


R = TypeVar("R", bound=Recipe)
# Where we think otherwise than the Trainer. Frozen parameters take part in every step, so DDP has none to look for.
_DEFAULTS: dict[str, Any] = {
    "ddp_find_unused_parameters": False, "logging_first_step": True, "logging_steps": 10,
    "save_total_limit": 3,
}  # fmt: skip
# Arguments of the Trainer that a recipe says by other names, or that its safety nets rest on.
_OURS = {
    "output_dir": "output", "bf16": "dtype", "fp16": "dtype", "report_to": None, "logging_nan_inf_filter": None,
    "remove_unused_columns": None, "prediction_loss_only": None, "enable_jit_checkpoint": None, "push_to_hub": None,
    "gradient_checkpointing_kwargs": None, "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": None, "do_train": None, "do_eval": None, "do_predict": None, "local_rank": None,
    "label_names": None,
}  # fmt: skip


def read_recipe(kind: type[R], path: Path, overrides: Sequence[str] = ()) -> R:
    """The recipe in a file, here or beside this package, with `key=value` laid over it; lora.r=16 reaches into a group.

    Raises RecipeError: no such file, no YAML, an unknown key (with the one that may be meant), a value that cannot be.
    """
    found = next((p for p in (path, HERE / path, HERE / "configs" / path) if p.is_file()), None)
    if found is None:
        known = listed(sorted(p.name for p in (HERE / "configs").glob("*.yaml")), 20)
        raise RecipeError(f"{path} is not there. Give a recipe's file; training/configs/ has {known}.")
    values = _parsed(found.read_text(encoding="utf-8"), str(found))
    if not isinstance(values, dict):
        raise RecipeError(f"{found} holds no `key: value` lines. Expected a recipe as in training/configs/.")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"{override!r} is no key=value. Write it without spaces: {key}=…")
        _set(values, key.split("."), _parsed(text, override), override)
    return recipe_of(kind, values)


def recipe_of(kind: type[R], values: dict[str, Any]) -> R:
    """The recipe of these keys. Raises RecipeError."""
    own = {key: values[key] for key in values if key in kind.model_fields and key != "arguments"}
    others = {key: values[key] for key in values if key not in own}
    try:
        return kind(**own, arguments={key: _argument(kind, key, value) for key, value in others.items()})
    except ValidationError as error:
        raise RecipeError(f"the recipe cannot be: {listed((_said(kind, one) for one in error.errors()), 4)}.") from None


def _argument(kind: type[Recipe], key: str, value: Any) -> Any:
    """An argument of the Trainer, with its kind of value. Raises RecipeError."""
    kinds = _trainer_arguments()
    if key in _OURS:
        instead = f"the recipe's key is {_OURS[key]}" if _OURS[key] else "cnq sets it, or has no use for it"
        raise RecipeError(f"{key} is an argument of the Trainer that a recipe does not take: {instead}.")
    if key not in kinds:
        raise RecipeError(_unknown(key, [*kind.model_fields, *kinds]))
    try:
        return TypeAdapter(kinds[key][0]).validate_python(value)
    except ValidationError as error:
        raise RecipeError(f"{key}={value}: {error.errors()[0]['msg'].lower()}.") from None


@cache
def _trainer_arguments() -> dict[str, tuple[Any, Any]]:
    """Name -> type, default."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {field.name: (hints[field.name], field.default) for field in fields(TrainingArguments) if field.init}


def _deepspeed(name: str) -> Path:
    """The configuration's file. Raises RecipeError."""
    folder = HERE / "configs" / "deepspeed"
    found = next((p for p in (folder / f"{name}.json", Path(name)) if p.is_file()), None)
    if found is None:
        raise RecipeError(
            f"deepspeed={name} is no file and not one of {listed(sorted(p.stem for p in folder.glob('*.json')))}."
        )
    return found


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, [name for name in known if name != "arguments"], 1, 0.5)
    hint = f"Did you mean {near[0]}?" if near else "Keys are those of the recipes in training/configs/, and the Trainer's."
    return f"there is no key {key}. {hint}"


def _said(kind: type[Recipe], error: Any) -> str:
    """One complaint of pydantic's."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown(key, [f"lora.{name}" for name in Lora.model_fields]).rstrip(".")
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{key}={error['input']}: {error['msg'].lower()}"


def _set(values: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise RecipeError(f"{override}: {key} is no group of keys.")
    values[keys[-1]] = value


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML reads 1e-4 as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _parsed(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is no YAML: {' '.join(str(error).split())}.") from None

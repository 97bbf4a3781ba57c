"""adapter_config.json: how strongly an adapter changes each module, and what was trained besides. The rules are PEFT's."""

import re
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint.hf import read_json
from ..errors import CheckpointError, listed

CONFIG = "adapter_config.json"
BASE_DIGEST = "cnq_base_digest"  # ours: the content digest of the base that the adapter was trained on

NO_TARGETS = "dummy-target-modules"  # PEFT's word, as target_modules, for an adapter of whole modules only

# Keys that say nothing about merging, and those that Settings holds. A key outside both must be empty.
_INDIFFERENT = {
    "auto_mapping", "corda_config", "ephemeral_gpu_offload", "eva_config", "inference_mode", "layers_pattern",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
_HELD = {
    "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "init_lora_weights", "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern",
    "target_modules", "trainable_token_indices", "use_dora", "use_rslora", BASE_DIGEST,
}  # fmt: skip
# The others (pissa, olora, corda, loftq, lora_ga) take a part out of the base, which the adapter's file does not hold.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What an adapter says of itself.

    rank, alpha: of modules that no pattern names; the patterns are regular expressions for the end of a module's name.
    rslora: the scale is alpha / √rank instead of alpha / rank.
    tied: an output head that shares the embedding's rows goes on sharing them (ensure_weight_tying).
    targets: what modules low-rank matters were trained for; None = not known, or only for some layers.
    saved: modules that were trained whole.
    tokens: end of an embedding's name -> the rows that were trained; "" stands for any embedding.
    base: what the base was called in training. base_digest: its content digest, if cnq recorded one.
    """

    rank: int
    alpha: float
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    fan_in_fan_out: bool = False
    tied: bool = False
    targets: tuple[str, ...] | str | None = None
    saved: tuple[str, ...] = ()
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    base: str | None = None
    base_digest: str | None = None

    def rank_of(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (sqrt(rank) if self.rslora else rank)

    def targeted(self, module: str, vocabulary: bool) -> bool:
        """Whether the adapter should hold a low-rank change of a module. vocabulary: it is an embedding or the head."""
        if self.targets is None or self.saves(module):
            return False
        if self.targets == "all-linear":
            return not vocabulary
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return _ends(module, self.targets)

    def saves(self, module: str) -> bool:
        return _ends(module, self.saved)

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        return next((rows for name, rows in self.tokens.items() if not name or _ends(module, [name])), None)


def _matching(pattern: dict[str, T], module: str, default: T) -> T:
    """The value of the first expression that fits the end of a module's name, as in peft.utils.other.get_pattern_key."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _ends(module: str, names: tuple[str, ...] | list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def read_settings(folder: Path) -> Settings:
    """adapter_config.json of a PEFT adapter.

    Raises CheckpointError for a kind of adapter, or a variant of LoRA, that cnq does not merge, and for values of another
    form than PEFT's.
    """
    path = folder / CONFIG
    config = read_json(path)
    _require_lora(path, config)

    def value(key: str, kind: type | tuple[type, ...], expected: str, default: Any = None) -> Any:
        found = config.get(key)
        if found is None:
            return default
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise _wrong(path, key, found, expected)
        return found

    def flag(key: str) -> bool:
        return value(key, bool, "true or false", False)

    def names(key: str) -> tuple[str, ...]:
        found = value(key, (list, str), "a list of names", [])
        found = [found] if isinstance(found, str) else found
        if not all(isinstance(name, str) for name in found):
            raise _wrong(path, key, found, "a list of names")
        return tuple(found)

    targets: tuple[str, ...] | str | None = names("target_modules")
    if isinstance(config.get("target_modules"), str):
        targets = str(config["target_modules"])
    if config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        targets = None
    settings = Settings(
        rank=config.get("r", 0),
        alpha=config.get("lora_alpha", 0),
        rank_pattern=value("rank_pattern", dict, "names and ranks", {}),
        alpha_pattern=value("alpha_pattern", dict, "names and numbers", {}),
        rslora=flag("use_rslora"),
        dora=flag("use_dora"),
        fan_in_fan_out=flag("fan_in_fan_out"),
        tied=flag("ensure_weight_tying"),
        targets=targets or None,
        saved=names("modules_to_save"),
        tokens=_tokens(path, config.get("trainable_token_indices")),
        base=value("base_model_name_or_path", str, "a name"),
        base_digest=value(BASE_DIGEST, str, "a sha256"),
    )
    for rank in (settings.rank, *settings.rank_pattern.values()):
        if type(rank) is not int or rank < 1:
            raise _wrong(path, "r or rank_pattern", rank, "a whole number above 0")
    for alpha in (settings.alpha, *settings.alpha_pattern.values()):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha or not isfinite(alpha):
            raise _wrong(path, "lora_alpha or alpha_pattern", alpha, "a number other than 0")
    for expression in (*settings.rank_pattern, *settings.alpha_pattern, *([targets] if isinstance(targets, str) else [])):
        try:
            re.compile(expression)
        except re.error as error:
            raise _wrong(path, "a pattern", expression, f"a regular expression ({error})") from None
    return settings


def _require_lora(path: Path, config: dict[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path} is of peft_type {kind!r}; cnq merges LORA (with rsLoRA and DoRA). Merge it with PEFT.")
    if unknown := sorted(key for key in config.keys() - _INDIFFERENT - _HELD if config[key]):
        raise CheckpointError(
            f"{path} sets {listed(f'{key} = {config[key]!r}' for key in unknown)}, a variant of LoRA that cnq does not merge. "
            "Merge it with PEFT, or train plain LoRA, rsLoRA or DoRA."
        )
    if (bias := config.get("bias", "none")) not in ("none", "all", "lora_only"):
        raise _wrong(path, "bias", bias, "none, all or lora_only")
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or init not in _INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights = {init!r} trained against a base with a part taken out, which is not in the adapter. "
            "Save it as plain LoRA: PEFT's save_pretrained with path_initial_model_for_weight_conversion."
        )


def _tokens(path: Path, given: Any) -> dict[str, tuple[int, ...]]:
    """trainable_token_indices: a list of rows, or the end of an embedding's name -> list of rows."""
    found = {"": given} if isinstance(given, list) else {} if given is None else given
    sound = isinstance(found, dict) and all(
        isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows) for rows in found.values()
    )
    if not sound:
        raise _wrong(path, "trainable_token_indices", given, "token numbers")
    return {name: tuple(rows) for name, rows in found.items()}


def _wrong(path: Path, key: str, found: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key} is {found!r}, expected {expected}. Save the adapter again, or download it again.")

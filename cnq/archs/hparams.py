"""The hyper-parameters of config.json as a GGUF's keys, and back.

Keys live under the architecture's name; their order is the reference converter's.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import CheckpointError, UnsupportedArch
from .arch import EXPERTS, EXPERTS_USED, FLOAT_MAX, INT_MAX, MOST, Arch, head_dim, n_heads, positive, whole, wrong
from .tensors import Config

U32, F32 = "uint32", "float32"


def rope(config: Config) -> Config:
    """The rotary settings under one set of names.

    Since transformers 5 they are `rope_parameters`; before, `rope_theta` and `rope_scaling` (whose type key was `type`
    at first). Raises CheckpointError for a setting that is no number.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise wrong("rope_scaling", given, "an object")
    found = dict(given)
    found.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    for key in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor"):
        if found.get(key) is not None and not positive(found[key]):
            raise wrong(key, found[key], "a number above 0")
    if (original := found["original_max_position_embeddings"]) is not None and not whole(original):
        raise wrong("original_max_position_embeddings", original, "a whole number above 0")
    return found


def hparams(config: Config, arch: Arch) -> Iterator[tuple[str, str, Any]]:
    """(GGUF key without the architecture, kind, value) of a config that passed Arch.check.

    Raises UnsupportedArch or CheckpointError for rope scaling that llama.cpp does not know, or that is incomplete.
    """
    yield "block_count", U32, config["num_hidden_layers"]
    yield "context_length", U32, context_length(config, arch)
    yield "embedding_length", U32, config["hidden_size"]
    yield "feed_forward_length", U32, config["intermediate_size"]
    yield "attention.head_count", U32, config["num_attention_heads"]
    yield "attention.head_count_kv", U32, n_heads(config, "num_key_value_heads")
    settings = rope(config)
    yield from _rope_scaling(settings, arch)
    yield "rope.freq_base", F32, settings["rope_theta"]
    yield "attention.layer_norm_rms_epsilon", F32, config["rms_norm_eps"]
    if arch.moe:
        yield "expert_count", U32, config[EXPERTS]
        yield "expert_used_count", U32, config[EXPERTS_USED]
    for key, value in (
        ("attention.key_length", head_dim(config)),
        ("attention.value_length", head_dim(config)),
        ("vocab_size", config["vocab_size"]),
        ("rope.dimension_count", head_dim(config)),
    ):
        if key in arch.states or (key.startswith("attention.") and config.get("head_dim")):
            yield key, U32, value


_YARN = (  # GGUF key, names in config.json
    ("rope.scaling.yarn_ext_factor", ("extrapolation_factor",)),
    ("rope.scaling.yarn_attn_factor", ("attention_factor", "attn_factor")),
    ("rope.scaling.yarn_beta_fast", ("beta_fast",)),
    ("rope.scaling.yarn_beta_slow", ("beta_slow",)),
)


def context_length(config: Config, arch: Arch) -> int:
    """How many tokens the model was trained to see."""
    return next((config[key] for key in arch.context if config.get(key)), 2048)  # LlamaConfig's default


def remarks(config: Config, arch: Arch) -> Iterator[str]:
    """For the user to know: what is done to the weights, and from which length on llama.cpp computes otherwise."""
    for link in arch.links(config):
        if link.unit_rows:
            yield f"{link.hf}: each row is divided by its length, as the model's own code does when it loads"
    window, context = config.get("sliding_window"), context_length(config, arch)
    if arch.windowed and window and window < context:
        yield (
            f"the model looks back {window} tokens only (sliding_window), llama.cpp to the beginning: "
            f"the same up to {window} tokens of text"
        )
    if rope(config)["rope_type"] == "dynamic":
        yield (
            f"dynamic rope scaling begins beyond {context} tokens, llama.cpp does not have it: the same up to there, and no "
            "good beyond"
        )


def _rope_scaling(settings: Config, arch: Arch) -> Iterator[tuple[str, str, Any]]:
    kind = settings["rope_type"]
    if kind not in arch.rope_types:
        raise UnsupportedArch(f"rope scaling {kind!r}; cnq converts {arch.classes[0]} with {', '.join(arch.rope_types)}.")
    if kind not in ("linear", "yarn"):  # llama3: per-frequency factors, a tensor of their own. dynamic: see `remarks`
        return
    if settings.get("factor") is None:
        raise wrong("factor", None, f"a number above 0 in rope_scaling of type {kind}")
    yield "rope.scaling.type", "string", kind
    yield "rope.scaling.factor", F32, settings["factor"]
    if kind == "yarn":
        original = settings["original_max_position_embeddings"]
        if original is None:
            raise CheckpointError(
                "config.json: yarn rope scaling without original_max_position_embeddings. Add it: the "
                "context length of the model before it was extended."
            )
        yield "rope.scaling.original_context_length", U32, original
        for key, names in _YARN:
            name = next((n for n in names if settings.get(n) is not None), None)
            if name:
                if not isinstance(settings[name], int | float) or not abs(settings[name]) < FLOAT_MAX:
                    raise wrong(name, settings[name], "a number")
                yield key, F32, settings[name]


def llama3_factors(config: Config) -> np.ndarray | None:
    """LLaMA 3.1's frequency factors, (head size / 2,) float32, or None for another kind of rope scaling.

    Wavelengths up to original/high_freq_factor keep their frequency, those from original/low_freq_factor on are slowed
    by `factor`, those between blend. Source: transformers, modeling_rope_utils._compute_llama3_parameters.
    """
    settings = rope(config)
    if settings["rope_type"] != "llama3":
        return None
    d = head_dim(config)
    factor, low, high = (
        settings.get(k, default) for k, default in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    original = settings["original_max_position_embeddings"] or 8192
    # To the bit as torch has it, which models run with: the power rounded once to float32 (numpy's own float32 power is
    # up to two bits off), and a / x as the product a * (1 / x).
    one = np.float32(1)
    freqs = one / (settings["rope_theta"] ** (np.arange(0, d, 2) / d)).astype(np.float32)
    factors = []
    for freq in freqs:
        wavelength = one / freq * np.float32(2 * np.pi)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (one / wavelength * np.float32(original) - np.float32(low)) / np.float32(high - low)
            factors.append(one / ((one - smooth) / np.float32(factor) + smooth))
    return np.array(factors, np.float32)


def config_of(fields: dict[str, Any], arch: Arch) -> Config:
    """The config.json that a GGUF's metadata stands for (without the rope factors of llama3, which are a tensor).

    Raises CheckpointError naming a key that is missing, or is not the number it should be.
    """

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"{arch.gguf}.{key}", default)

    def checked(key: str, default: Any, sound: Callable[[Any], bool], expected: str) -> Any:
        value = get(key, default)
        if value is None:
            raise CheckpointError(f"the GGUF has no {arch.gguf}.{key}; it is incomplete. Convert it again from its checkpoint.")
        if not sound(value):
            raise CheckpointError(
                f"the GGUF says {arch.gguf}.{key} = {value!r}, expected {expected}. It is damaged, or of a variant that cnq "
                "does not know: convert it again from its checkpoint."
            )
        return value

    def size(key: str, default: int | None = None, most: int = INT_MAX) -> int:
        return checked(key, default, lambda value: whole(value, most), f"a whole number from 1 to {most}")

    def real(key: str, default: float | None = None) -> float:
        return _decimal(checked(key, default, positive, "a number above 0"))

    heads, hidden = size("attention.head_count"), size("embedding_length")
    config: Config = {
        "architectures": [arch.classes[0]],
        "model_type": arch.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count", most=MOST["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": size("attention.key_length", size("rope.dimension_count", max(1, hidden // heads))),
        **dict.fromkeys(arch.context, size("context_length", 2048)),
        "rms_norm_eps": real("attention.layer_norm_rms_epsilon"),
        "rope_theta": real("rope.freq_base", 10000.0),
    }
    if arch.moe:
        config[EXPERTS] = size("expert_count", most=MOST[EXPERTS])
        config[EXPERTS_USED] = size("expert_used_count")
    kind = get("rope.scaling.type", "none")
    if kind != "none":
        scaling = {"rope_type": kind, "factor": real("rope.scaling.factor", 1.0)}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
            scaling |= {names[0]: _decimal(get(key)) for key, names in _YARN if isinstance(get(key), int | float)}
        config["rope_scaling"] = scaling
    return config


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))

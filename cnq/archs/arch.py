"""The words that a family is described in: where each tensor goes, and which hyper-parameters say the same on both sides."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CheckpointError, UnsupportedArch

Config = dict[str, Any]


@dataclass(frozen=True)
class To:
    """Where a Hugging Face tensor goes in the GGUF.

    name: GGUF name, {} = layer.
    shape: sizes by letter: V vocabulary, D hidden, F feed-forward, Q query heads x head size, K key-value heads x head size.
    rope_heads: the config key that counts the heads whose rows are reordered for rotary attention.
    when: the config flag that brings the tensor into being; None = always there.
    """

    name: str
    shape: str
    rope_heads: str | None = None
    when: str | None = None

    def forward(self, data: np.ndarray, config: Config) -> np.ndarray:
        """HF rows -> GGUF rows. Rows are moved whole, so any storage type will do; a plain rename returns `data` itself.

        HF's rotary attention turns the halves of a head against each other, llama.cpp's `llama` adjacent pairs:
        per head (2, d/2) rows become (d/2, 2). It is the inverse of `permute` in transformers'
        convert_llama_weights_to_hf.py.
        """
        if self.rope_heads is None:
            return data
        heads = _heads(config, self.rope_heads)
        return data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)

    def back(self, data: np.ndarray, config: Config) -> np.ndarray:
        """GGUF rows -> HF rows."""
        if self.rope_heads is None:
            return data
        heads = _heads(config, self.rope_heads)
        return data.reshape(heads, -1, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


# Tensors left out of the GGUF on purpose: llama.cpp derives the rotary frequencies from rope.freq_base. (The second is Meta's.)
DROPPED = (".rotary_emb.inv_freq", "rope.freqs")

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MORE_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")  # may be absent or null
_MOST = {"num_hidden_layers": 512}  # llama.cpp src/llama-hparams.h, LLAMA_MAX_LAYERS
_INT_MAX, _FLOAT_MAX = 2**31 - 1, 3.4e38


@dataclass(frozen=True)
class Arch:
    """A family of models.

    gguf: its name in general.architecture. classes: config.json's `architectures`. model_type: config.json's.
    tensors: HF name, {} = layer -> To.
    requires: config keys whose value is fixed because this description holds for it alone; absent counts as equal.
    head_sizes: whether the sizes of a head stand in the GGUF; without them llama.cpp divides hidden size by heads.
    vocab_size: whether the vocabulary's size stands in the GGUF beside the tokens.
    """

    gguf: str
    classes: tuple[str, ...]
    model_type: str
    tensors: dict[str, To]
    requires: tuple[tuple[str, Any], ...]
    head_sizes: bool
    vocab_size: bool

    def check(self, config: Config) -> None:
        """Raise CheckpointError for a size that is missing or absurd, UnsupportedArch for a variant not described here."""
        for key in (*_SIZES, *(k for k in _MORE_SIZES if config.get(k) is not None)):
            most = _MOST.get(key, _INT_MAX)
            if not _size(config.get(key), most):
                raise _wrong(key, config.get(key), f"a whole number from 1 to {most}")
        if not _positive(config.get("rms_norm_eps")):
            raise _wrong("rms_norm_eps", config.get("rms_norm_eps"), "a number above 0")
        for key, value in self.requires:
            if config.get(key, value) != value:
                raise UnsupportedArch(f"{self.classes[0]} with {key} = {config[key]!r}; cnq describes {value!r} only.")

    def expected(self, config: Config) -> Iterator[tuple[str, str, To, tuple[int, ...]]]:
        """(HF name, GGUF name, rule, shape) of every tensor that a complete checkpoint has, layer by layer.

        An output head that shares the embedding's rows (tie_word_embeddings) is not counted.
        """
        sizes = _sizes(config)
        tied = bool(config.get("tie_word_embeddings"))
        for layer in range(-1, int(config["num_hidden_layers"])):
            for hf_name, to in self.tensors.items():
                if ("{}" in hf_name) != (layer >= 0) or (to.when and not config.get(to.when)):
                    continue
                if tied and to.name == "output.weight":
                    continue
                yield hf_name.format(layer), to.name.format(layer), to, tuple(sizes[letter] for letter in to.shape)


def _size(value: Any, most: int = _INT_MAX) -> bool:
    return type(value) is int and 1 <= value <= most  # True is an int, too


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < _FLOAT_MAX


def _wrong(key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: {key} is {value!r}, expected {expected}. Take config.json from the model's own repository."
    )


def head_dim(config: Config) -> int:
    """The size of one attention head; absent or null means hidden size / heads, as in transformers."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _heads(config: Config, key: str) -> int:
    return int(config.get(key) or config["num_attention_heads"])  # no num_key_value_heads before LLaMA-2: no GQA


def _sizes(config: Config) -> dict[str, int]:
    d = head_dim(config)
    return {
        "V": int(config["vocab_size"]),
        "D": int(config["hidden_size"]),
        "F": int(config["intermediate_size"]),
        "Q": d * int(config["num_attention_heads"]),
        "K": d * _heads(config, "num_key_value_heads"),
    }


# Hyper-parameters. GGUF keys live under the architecture's name; the order is the reference converter's.

U32, F32 = "uint32", "float32"


def rope(config: Config) -> Config:
    """The rotary settings under one set of names.

    Since transformers 5 they are `rope_parameters`; before, `rope_theta` and `rope_scaling` (whose type key was `type`
    at first). Raises CheckpointError for a setting that is no number.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise _wrong("rope_scaling", given, "an object")
    found = dict(given)
    found.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    for key in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor"):
        if found.get(key) is not None and not _positive(found[key]):
            raise _wrong(key, found[key], "a number above 0")
    if (original := found["original_max_position_embeddings"]) is not None and not _size(original):
        raise _wrong("original_max_position_embeddings", original, "a whole number above 0")
    return found


def hparams(config: Config, arch: Arch) -> Iterator[tuple[str, str, Any]]:
    """(GGUF key without the architecture, kind, value) of a config that passed Arch.check.

    Raises UnsupportedArch or CheckpointError for rope scaling that llama.cpp does not know, or that is incomplete.
    """
    yield "block_count", U32, config["num_hidden_layers"]
    yield "context_length", U32, config.get("max_position_embeddings") or 2048  # LlamaConfig's default
    yield "embedding_length", U32, config["hidden_size"]
    yield "feed_forward_length", U32, config["intermediate_size"]
    yield "attention.head_count", U32, config["num_attention_heads"]
    yield "attention.head_count_kv", U32, _heads(config, "num_key_value_heads")
    settings = rope(config)
    yield from _rope_scaling(settings)
    yield "rope.freq_base", F32, settings["rope_theta"]
    yield "attention.layer_norm_rms_epsilon", F32, config["rms_norm_eps"]
    if arch.head_sizes or config.get("head_dim"):
        yield "attention.key_length", U32, head_dim(config)
        yield "attention.value_length", U32, head_dim(config)
    if arch.vocab_size:
        yield "vocab_size", U32, config["vocab_size"]
    if arch.head_sizes:
        yield "rope.dimension_count", U32, head_dim(config)


_YARN = (  # GGUF key, names in config.json
    ("rope.scaling.yarn_ext_factor", ("extrapolation_factor",)),
    ("rope.scaling.yarn_attn_factor", ("attention_factor", "attn_factor")),
    ("rope.scaling.yarn_beta_fast", ("beta_fast",)),
    ("rope.scaling.yarn_beta_slow", ("beta_slow",)),
)


def _rope_scaling(settings: Config) -> Iterator[tuple[str, str, Any]]:
    kind = settings["rope_type"]
    if kind in ("default", "llama3"):  # llama3: per-frequency factors, a tensor of their own (llama3_factors)
        return
    if kind not in ("linear", "yarn"):
        raise UnsupportedArch(
            f"rope scaling {kind!r}: llama.cpp knows default, linear, yarn and llama3. A model trained with dynamic NTK runs "
            "within its trained context when rope_scaling is removed from config.json."
        )
    if settings.get("factor") is None:
        raise _wrong("factor", None, f"a number above 0 in rope_scaling of type {kind}")
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
                if not isinstance(settings[name], int | float) or not abs(settings[name]) < _FLOAT_MAX:
                    raise _wrong(name, settings[name], "a number")
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

    def size(key: str, default: int | None = None, most: int = _INT_MAX) -> int:
        return checked(key, default, lambda value: _size(value, most), f"a whole number from 1 to {most}")

    def real(key: str, default: float | None = None) -> float:
        return _decimal(checked(key, default, _positive, "a number above 0"))

    heads, hidden = size("attention.head_count"), size("embedding_length")
    config: Config = {
        "architectures": [arch.classes[0]],
        "model_type": arch.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count", most=_MOST["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": size("attention.key_length", size("rope.dimension_count", max(1, hidden // heads))),
        "max_position_embeddings": size("context_length", 2048),
        "rms_norm_eps": real("attention.layer_norm_rms_epsilon"),
        "rope_theta": real("rope.freq_base", 10000.0),
    }
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

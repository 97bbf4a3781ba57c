"""What a family of models is: its names, its tensors, and the configurations that its description holds for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, UnsupportedArch
from .tensors import Config, Link, Packed, Tensors, To

# Tensors left out of the GGUF on purpose: llama.cpp derives the rotary frequencies from rope.freq_base. (The second is Meta's.)
DROPPED = (".rotary_emb.inv_freq", "rope.freqs")

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MORE_SIZES = ("num_key_value_heads", "head_dim")
EXPERTS, EXPERTS_USED = "num_local_experts", "num_experts_per_tok"
MOST = {"num_hidden_layers": 512, EXPERTS: 1024}  # llama.cpp src/llama-hparams.h, LLAMA_MAX_LAYERS and _EXPERTS
INT_MAX, FLOAT_MAX = 2**31 - 1, 3.4e38


@dataclass(frozen=True)
class Only:
    """A config key of which this description holds for some values alone; absent counts as the first. why: for the user."""

    key: str
    values: tuple[Any, ...]
    why: str = ""


SILU = Only("hidden_act", ("silu",))


@dataclass(frozen=True)
class Arch:
    """A family of models.

    gguf: its name in general.architecture. classes: config.json's `architectures`. model_type: config.json's.
    tensors: what becomes of each HF tensor.
    requires: the values of the config that this description holds for.
    states: keys of the GGUF that say what llama.cpp assumes anyhow; the reference converter writes them for some families.
    defaults: what an absent config key means, where that is not what it means for LLaMA.
    context: config keys of the trained context's length, the first present counts.
    rope_types: kinds of rope scaling that llama.cpp computes for the family.
    windowed: whether config's sliding_window, when set, limits how far back the model looks.
    """

    gguf: str
    classes: tuple[str, ...]
    model_type: str
    tensors: Tensors
    requires: tuple[Only, ...]
    states: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    context: tuple[str, ...] = ("max_position_embeddings",)
    rope_types: tuple[str, ...] = ("default", "dynamic", "linear", "yarn")
    windowed: bool = False

    @property
    def moe(self) -> bool:
        return any(name.count("{}") == 2 for name in self.tensors)

    def check(self, config: Config) -> None:
        """Raise CheckpointError for a size that is missing or absurd, UnsupportedArch for a variant not described here."""
        needed = (*_SIZES, EXPERTS, EXPERTS_USED) if self.moe else _SIZES
        optional = (*_MORE_SIZES, *self.context, *(("sliding_window",) if self.windowed else ()))
        for key in (*needed, *(k for k in optional if config.get(k) is not None)):
            most = MOST.get(key, INT_MAX)
            if not whole(config.get(key), most):
                raise wrong(key, config.get(key), f"a whole number from 1 to {most}")
        if self.moe and config[EXPERTS_USED] > config[EXPERTS]:
            raise wrong(EXPERTS_USED, config[EXPERTS_USED], f"no more than {EXPERTS}, which is {config[EXPERTS]}")
        if (heads := config["num_attention_heads"]) % (kv := n_heads(config, "num_key_value_heads")):
            raise wrong("num_key_value_heads", kv, f"a divisor of num_attention_heads, which is {heads}")
        if not config.get("head_dim") and config["hidden_size"] % heads:
            raise wrong("num_attention_heads", heads, f"a divisor of hidden_size, which is {config['hidden_size']}")
        if (size := head_dim(config)) % 2:
            raise wrong("head_dim", size, "an even number: rotary attention turns pairs")
        if not positive(config.get("rms_norm_eps")):
            raise wrong("rms_norm_eps", config.get("rms_norm_eps"), "a number above 0")
        for only in self.requires:
            if (found := config.get(only.key, only.values[0])) not in only.values:
                described = " or ".join(map(repr, only.values))
                raise UnsupportedArch(
                    f"{self.classes[0]} with {only.key} = {found!r}; cnq describes {described} only"
                    f"{only.why and f': {only.why}'}."
                )

    def hf_name(self, gguf: str) -> str:
        """The HF name of a tensor that is not of a layer, by its GGUF name."""
        return next(name for name, rule in self.tensors.items() if not isinstance(rule, Packed) and rule.name == gguf)

    def links(self, config: Config) -> Iterator[Link]:
        """What becomes of every tensor that a complete checkpoint has, layer by layer.

        An output head that shares the embedding's rows (tie_word_embeddings) is not counted.
        """
        sizes = _sizes(config)
        for layer in range(-1, int(config["num_hidden_layers"])):
            for name, rule in self.tensors.items():
                if ("{}" in name) != (layer >= 0):
                    continue
                for expert in range(sizes["E"]) if name.count("{}") == 2 else (None,):
                    yield from _linked(name.format(layer, expert), rule, config, sizes, layer, expert)

    def expected(self, config: Config) -> dict[str, tuple[int, ...]]:
        """HF name -> shape of every tensor that a complete checkpoint has."""
        shapes: dict[str, tuple[int, ...]] = {}
        for link in self.links(config):
            above = shapes.get(link.hf, (0,))[0]  # rows of the parts before, in a packed tensor
            shapes[link.hf] = (above + link.shape[0], *link.shape[1:])
        return shapes


def _linked(
    hf: str, rule: To | Packed, config: Config, sizes: dict[str, int], layer: int, expert: int | None
) -> Iterator[Link]:
    packed = rule if isinstance(rule, Packed) else Packed((rule,))
    groups = n_heads(config, packed.groups) if packed.groups else 1
    first = 0
    for to in packed.parts:
        if (to.when and not config.get(to.when)) or (to.name == "output.weight" and config.get("tie_word_embeddings")):
            continue
        shape = tuple(sizes[letter] for letter in to.shape)
        last = first + shape[0] // groups
        yield Link(
            hf=hf,
            gguf=to.name.format(layer),
            shape=shape,
            groups=groups,
            rows=(first, last) if len(packed.parts) > 1 else None,
            heads=n_heads(config, to.rope_heads) if to.rope_heads else 0,
            expert=expert,
            unit_rows=to.unit_rows is not None and to.unit_rows(config),
            float32=to.float32,
        )
        first = last


def whole(value: Any, most: int = INT_MAX) -> bool:
    return type(value) is int and 1 <= value <= most  # True is an int, too


def positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < FLOAT_MAX


def wrong(key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: {key} is {value!r}, expected {expected}. Take config.json from the model's own repository."
    )


def head_dim(config: Config) -> int:
    """The size of one attention head; absent or null means hidden size / heads, as in transformers."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def n_heads(config: Config, key: str) -> int:
    return int(config.get(key) or config["num_attention_heads"])  # no num_key_value_heads before LLaMA-2: no GQA


def _sizes(config: Config) -> dict[str, int]:
    d = head_dim(config)
    return {
        "V": int(config["vocab_size"]),
        "D": int(config["hidden_size"]),
        "F": int(config["intermediate_size"]),
        "E": int(config.get(EXPERTS) or 0),
        "H": d,
        "Q": d * int(config["num_attention_heads"]),
        "K": d * n_heads(config, "num_key_value_heads"),
    }

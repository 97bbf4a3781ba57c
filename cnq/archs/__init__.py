"""Which family a model is of."""

from typing import Any

from ..errors import CheckpointError, UnsupportedArch, listed
from .arch import Arch
from .baichuan import BAICHUAN
from .internlm2 import INTERNLM2
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .yi import YI

ARCHS = (LLAMA, MISTRAL, MIXTRAL, YI, QWEN2, QWEN3, INTERNLM2, BAICHUAN)


def of_config(config: dict[str, Any]) -> Arch:
    """The family of a config.json, in which the family's defaults are filled in.

    Raises UnsupportedArch, naming the family found and those known; CheckpointError.
    """
    classes = config.get("architectures") or []
    if not isinstance(classes, list):
        raise CheckpointError(f"config.json: architectures is {classes!r}, expected a list of names.")
    for arch in ARCHS:
        if any(c in arch.classes for c in classes) or (not classes and config.get("model_type") == arch.model_type):
            for key, value in arch.defaults:
                config.setdefault(key, value)
            arch.check(config)
            return arch
    known = listed([a.classes[0] for a in ARCHS], len(ARCHS))
    found = listed(map(str, classes)) or config.get("model_type") or "no family"
    raise UnsupportedArch(f"config.json is of {found}; cnq knows {known}. For others there is llama.cpp's own converter.")


def of_gguf(name: str, n_experts: int) -> Arch:
    """The family of a GGUF's general.architecture and expert_count (0 = dense). Raises UnsupportedArch.

    Families that share an architecture and its tensors come back as the first of them: a Mistral is a LLaMA to llama.cpp.
    """
    for arch in ARCHS:
        if arch.gguf == name and arch.moe == bool(n_experts):
            return arch
    known = listed(dict.fromkeys(a.gguf for a in ARCHS), len(ARCHS))
    raise UnsupportedArch(f"the GGUF is of architecture {name}{' with experts' if n_experts else ''}; cnq knows {known}.")

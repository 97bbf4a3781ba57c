"""Which family a model is of."""

from typing import Any

from ..errors import CheckpointError, UnsupportedArch, listed
from .arch import Arch
from .llama import LLAMA
from .qwen2 import QWEN2

ARCHS = (LLAMA, QWEN2)


def of_config(config: dict[str, Any]) -> Arch:
    """The family of a config.json. Raises UnsupportedArch, naming the family found and those known; CheckpointError."""
    classes = config.get("architectures") or []
    if not isinstance(classes, list):
        raise CheckpointError(f"config.json: architectures is {classes!r}, expected a list of names.")
    for arch in ARCHS:
        if any(c in arch.classes for c in classes) or (not classes and config.get("model_type") == arch.model_type):
            arch.check(config)
            return arch
    known = listed([a.classes[0] for a in ARCHS], len(ARCHS))
    found = listed(map(str, classes)) or config.get("model_type") or "no family"
    raise UnsupportedArch(f"config.json is of {found}; cnq knows {known}. For others there is llama.cpp's own converter.")


def of_gguf(name: str) -> Arch:
    """The family of a GGUF's general.architecture. Raises UnsupportedArch."""
    for arch in ARCHS:
        if arch.gguf == name:
            return arch
    raise UnsupportedArch(f"the GGUF is of architecture {name}; cnq knows {listed([a.gguf for a in ARCHS], len(ARCHS))}.")

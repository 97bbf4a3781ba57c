"""A choice of types as a small text file: <name>.recipe.toml, and <name>.tensor-types.txt for llama-quantize.

The first reproduces a file to the byte, given the same float GGUF, importance matrix and rounding. The second is what
llama-quantize --tensor-type-file reads: NAME=TYPE between spaces, which no TOML can be.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import QuantizeError, listed
from ..files import replacing, sha256
from ..gguf_file import TYPE_BY_NAME, GgufFile
from ..quantize import ROUNDINGS, anchored
from .groups import place

ENDING, TYPES_ENDING = ".recipe.toml", ".tensor-types.txt"
_FORMAT = 1
_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)\.weight")
_KEYS = {"format": int, "model": str, "type": str, "rounding": str, "nbytes": int, "tensors": dict}
_OPTIONAL = {"imatrix": str, "imatrix_sha256": str, "sha256": str}


@dataclass(frozen=True)
class Recipe:
    """model: general.name of the one it was made for. type: of the metadata, a stock mixture's. types: of each tensor.

    nbytes, sha256: of the file it makes there. imatrix, imatrix_sha256: what weighed the errors; None = nothing.
    """

    model: str
    type: str
    rounding: str
    nbytes: int
    types: Mapping[str, str]
    imatrix: str | None = None
    imatrix_sha256: str | None = None
    sha256: str | None = None


def write_recipe(recipe: Recipe, path: Path, types_path: Path) -> None:
    """Write both files, over earlier ones."""
    strings = {"imatrix": recipe.imatrix, "imatrix_sha256": recipe.imatrix_sha256, "sha256": recipe.sha256}
    lines = [
        "# Types that cnq chose for a size. The same file again: cnq quantize SRC DST --recipe THIS --imatrix IMATRIX",
        f"format = {_FORMAT}",
        f"model = {_quoted(recipe.model)}",
        f"type = {_quoted(recipe.type)}",
        f"rounding = {_quoted(recipe.rounding)}",
        *(f"{key} = {_quoted(value)}" for key, value in strings.items() if value),
        f"nbytes = {recipe.nbytes}",
        "",
        "[tensors]",
        *(f"{_quoted(name)} = {_quoted(type)}" for name, type in recipe.types.items()),
    ]
    flat = [f"{pattern}={type.lower()}" for pattern, type in anchored(recipe.types)]
    for where, text in ((path, lines), (types_path, flat)):
        with replacing(where, force=True) as partial:
            partial.write_text("\n".join(text) + "\n", encoding="utf-8", newline="\n")


def _quoted(text: str) -> str:
    """A basic string of TOML; JSON's escapes are among its own."""
    return json.dumps(text, ensure_ascii=True).replace("\x7f", "\\u007f")


def read_recipe(path: Path) -> Recipe:
    """Raises QuantizeError, by name, for what is no recipe, or one that this cnq does not know."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuantizeError(f"{path} cannot be read: {error.strerror}. Give the .recipe.toml that cnq wrote.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise QuantizeError(f"{path} is no recipe: {error}. Give the .recipe.toml that cnq wrote.") from None
    _require(path, content)
    types = content.pop("tensors")
    content.pop("format")
    return Recipe(types=types, **content)


def _require(path: Path, content: dict[str, Any]) -> None:
    if content.get("format") != _FORMAT:
        raise QuantizeError(f"{path} says format = {content.get('format')!r}, this cnq reads {_FORMAT}.")
    if unknown := sorted(content.keys() - _KEYS.keys() - _OPTIONAL.keys()):
        raise QuantizeError(f"{path} has {listed(unknown)}, which no recipe has. Keys are {', '.join(_KEYS | _OPTIONAL)}.")
    if missing := sorted(_KEYS.keys() - content.keys()):
        raise QuantizeError(f"{path} lacks {listed(missing)}.")
    for key, kind in (_KEYS | _OPTIONAL).items():
        if key in content and type(content[key]) is not kind:
            raise QuantizeError(f"{path}: {key} = {content[key]!r}, expected {kind.__name__}.")
    if content["rounding"] not in ROUNDINGS:
        raise QuantizeError(f"{path}: rounding = {content['rounding']!r}, expected one of {', '.join(ROUNDINGS)}.")
    if not content["tensors"]:
        raise QuantizeError(f"{path} names no tensors.")
    for name, kind in content["tensors"].items():
        if kind not in TYPE_BY_NAME:
            raise QuantizeError(f"{path}: {name} = {kind!r}, which is no type of tensor. There is {', '.join(TYPE_BY_NAME)}.")


def unlike(recipe: Recipe, types: Mapping[str, str], imatrix: Path | None, rounding: str | None) -> list[str]:
    """Why the file will not be the recipe's own, byte for byte; nothing when it will."""
    told = []
    if dict(types) != dict(recipe.types):
        told.append(f"the recipe was made for {recipe.model}, a model with other tensors: types go by role and depth")
    if (sha256(imatrix) if imatrix else None) != recipe.imatrix_sha256:
        told.append(f"the recipe was made with {recipe.imatrix or 'no importance matrix'}: another one gives other bytes")
    if rounding and rounding != recipe.rounding:
        told.append(f"the recipe was made with {recipe.rounding} rounding: {rounding} gives other bytes")
    return told


def applied(recipe: Recipe, file: GgufFile, quantized: list[str]) -> dict[str, str]:
    """The recipe's type of each of the tensors that are to be quantized, in a model of the same family.

    A model of another depth takes the types of the layers at the same relative depth; one with an output of its own, where the
    recipe's had none, the embedding's. Raises QuantizeError for a tensor that the recipe says nothing about.
    """
    if recipe.types.keys() == set(quantized):
        return {name: recipe.types[name] for name in quantized}
    by_role: dict[str, dict[int, str]] = {}
    for name, type in recipe.types.items():
        if m := _LAYER.fullmatch(name):
            by_role.setdefault(m[2], {})[int(m[1])] = type
    placed = {name: place(file.tensors[name]) for name in quantized}
    depth = 1 + max((w[1] for w in placed.values() if w and w[1] is not None), default=0)
    found = {}
    for name, where in placed.items():
        layers = by_role.get(where[0], {}) if where else {}
        if name in recipe.types and (where is None or where[1] is None or depth == 1 + max(layers, default=0)):
            found[name] = recipe.types[name]
        elif where and where[1] is not None and layers:
            known = sorted(layers)
            found[name] = layers[known[where[1] * len(known) // depth]]
        elif name == "output.weight" and "token_embd.weight" in recipe.types:
            found[name] = recipe.types["token_embd.weight"]
        else:
            raise QuantizeError(
                f"the recipe, made for {recipe.model}, says nothing about {name}: {file.path} is of another family. "
                "Make one for it: cnq quantize --size"
            )
    return found

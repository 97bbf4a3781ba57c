"""What is in a GGUF: family, sizes, tokenizer, prompt format, tensors by type."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import prompts
from .errors import PromptError
from .gguf_file import GgufFile


@dataclass(frozen=True)
class Inspected:
    """types: tensor type -> (tensors, bytes). format: the prompt format that the chat template says, None = none known.

    notes: what is wrong with the template.
    """

    path: Path
    arch: str
    name: str | None
    n_params: int
    bits_per_weight: float
    nbytes: int
    n_ctx: int | None
    n_layers: int | None
    n_vocab: int
    tokenizer: str
    format: str | None
    has_template: bool
    types: dict[str, tuple[int, int]]
    fields: dict[str, Any]
    notes: tuple[str, ...]


def inspect(path: Path) -> Inspected:
    """Read a GGUF's metadata. Raises GgufError."""
    file = GgufFile(path)
    fields = file.fields
    template = prompts.template_of(fields)
    known = prompts.of_template(template) if template else None
    count = Counter(t.type.name for t in file.tensors.values())
    size: Counter[str] = Counter()
    for t in file.tensors.values():
        size[t.type.name] += t.nbytes
    model, pre = fields.get("tokenizer.ggml.model", "none"), fields.get("tokenizer.ggml.pre")
    tokens = fields.get("tokenizer.ggml.tokens")
    return Inspected(
        path=path,
        arch=file.arch,
        name=fields.get("general.name"),
        n_params=file.n_params,
        bits_per_weight=file.bits_per_weight,
        nbytes=path.stat().st_size,
        n_ctx=fields.get(f"{file.arch}.context_length"),
        n_layers=fields.get(f"{file.arch}.block_count"),
        n_vocab=len(tokens) if isinstance(tokens, list) else 0,
        tokenizer=f"{model} ({pre})" if pre else model,
        format=known[0].name if known else None,
        has_template=template is not None,
        types={name: (count[name], size[name]) for name, _ in size.most_common()},
        fields={key: value if not isinstance(value, list) else f"list of {len(value)}" for key, value in fields.items()},
        notes=tuple(_wrong(template, fields)) if template else (),
    )


def _wrong(template: str, fields: dict[str, Any]) -> Iterator[str]:
    try:
        end = prompts.ending(template, fields)
    except PromptError as error:
        yield str(error)
        return
    if end and end.warning:
        yield end.warning

"""GGUF → Modelfile for Ollama, with the prompt format said outright: Ollama guesses it from a list of known templates.

Grammar: ollama parser/parser.go and api/types.go, as of v0.32 (2026-08).
"""

from dataclasses import dataclass
from pathlib import Path

from . import prompts
from .errors import PromptError
from .files import replacing
from .gguf_file import GgufFile

MAX_CTX = 4096  # Ollama's own default; more costs memory from the start


@dataclass(frozen=True)
class Modelfile:
    """format: of the prompt, None when the GGUF's own Jinja template is left to Ollama (0.30 or newer)."""

    path: Path
    format: str | None
    notes: tuple[str, ...]


def write_modelfile(gguf: Path, dst: Path, *, format: str | None = None, force: bool = False) -> Modelfile:
    """Write a Modelfile for `gguf` to `dst`.

    format: a name in prompts.FORMATS; None = the one that the GGUF's chat template says.
    Raises GgufError, PromptError (no template and no format), OutputExists.
    """
    text, chosen, notes = modelfile(gguf, dst.parent, format)
    with replacing(dst, force=force) as partial:
        partial.write_text(text, encoding="utf-8")
    return Modelfile(dst, chosen, tuple(notes))


def modelfile(gguf: Path, folder: Path, format: str | None = None) -> tuple[str, str | None, list[str]]:
    """(text, format, notes) of the Modelfile in `folder` for `gguf`."""
    fields = GgufFile(gguf).fields
    jinja = prompts.template_of(fields)
    found, system, notes = None, None, []
    if format:
        found = prompts.named(format)
        system = found.system
    elif jinja is None:
        raise PromptError(
            f"{gguf} has no chat template. Name the format the model was trained with: --format {'|'.join(prompts.FORMATS)}"
        )
    elif known := prompts.of_template(jinja):
        found, system = known
    else:
        notes.append("the chat template is none that cnq can say in Go: TEMPLATE is left out, which takes Ollama 0.30 or newer")
    arch = fields.get("general.architecture", "llama")
    here = gguf.resolve()
    source = f"./{here.name}" if here.parent == folder.resolve() else str(here)
    lines = [f"FROM {_quoted(source)}"]
    if found:
        lines.append(f"TEMPLATE {_quoted(found.go)}")
    if system:
        lines.append(f"SYSTEM {_quoted(system)}")
        notes += _dropped(system)
    settings = found or prompts.CHATML
    parameters: list[tuple[str, object]] = [
        ("num_ctx", min(MAX_CTX, fields.get(f"{arch}.context_length", MAX_CTX))),
        ("temperature", settings.temperature),
        ("repeat_penalty", settings.repeat_penalty),  # said because Ollama's default went from 1.1 to 1.0 in v0.32.10
        *settings.parameters.items(),
        *(("stop", stop) for stop in (found.stop if found else ())),
    ]
    lines += [f"PARAMETER {name} {_quoted(str(value))}" for name, value in parameters]
    return "\n".join(lines) + "\n", found.name if found else None, notes


def _quoted(value: str) -> str:
    """A value as Ollama's parser reads it back: to the end of the line, or between triple quotes; it knows no escapes."""
    if value and value == value.strip() and "\n" not in value and not value.startswith('"'):
        return value
    if '"""' in value or value.endswith('"'):
        raise PromptError(f"a Modelfile cannot hold this text, its quotes end too early: {value[:80]!r}")
    return f'"""{value}"""'


def _dropped(text: str) -> list[str]:
    """Characters that Ollama's parser drops without a word: those Go does not count as printable."""
    lost = sorted({c for c in text if not (c.isprintable() or c in "\n\t") or c in "\u3000\u00a0"})
    return [f"Ollama drops {', '.join(f'U+{ord(c):04X}' for c in lost)} from SYSTEM when it reads a Modelfile"] if lost else []

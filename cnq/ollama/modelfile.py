"""GGUF → Modelfile, with the prompt format said outright: Ollama guesses it from a list of known templates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import prompts
from ..errors import OllamaError, PromptError
from ..files import replacing
from ..gguf_file import GgufFile
from .grammar import Command, kept, written

MAX_CTX = 4096  # Ollama's own default; more costs memory from the start
_ADD_BOS = ("llama3", "llama-v3", "llama-bpe", "tekken")  # pre-tokenizers of BPE that llama.cpp lets bos stand before
_QUESTION = {"role": "user", "content": "甲"}


@dataclass(frozen=True)
class Recipe:
    """What Ollama is told of a GGUF. format: of the prompt, None = none that is known.

    template: Go; None = the GGUF's own Jinja template is left to Ollama (0.30 or newer). parameters: Ollama's options.
    """

    gguf: Path
    format: str | None
    template: str | None
    system: str | None
    license: str | None
    parameters: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Modelfile:
    """format: of the prompt, None when the GGUF's own Jinja template is left to Ollama."""

    path: Path
    format: str | None
    notes: tuple[str, ...]


def write_modelfile(gguf: Path, dst: Path, *, format: str | None = None, force: bool = False) -> Modelfile:
    """Write a Modelfile for `gguf` to `dst`.

    format: a name in prompts.FORMATS; None = the one that the GGUF's chat template says.
    Raises GgufError, PromptError (no template and no format, or one that cannot be rendered), OllamaError (a path or a text
    that a Modelfile cannot hold), OutputExists.
    """
    recipe = recipe_of(gguf, format)
    text = modelfile(recipe, dst.parent)
    with replacing(dst, force=force) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    return Modelfile(dst, recipe.format, (*recipe.notes, *_dropped(recipe.system or "")))


def recipe_of(gguf: Path, format: str | None = None) -> Recipe:
    """Raises GgufError, PromptError."""
    file = GgufFile(gguf)
    fields, jinja = file.fields, prompts.template_of(file.fields)
    own = prompts.of_template(jinja) if jinja else None
    if format:
        chosen = prompts.named(format)
        known: tuple[prompts.Format, str | None] | None = (chosen, chosen.system)
    elif jinja:
        known = own
    else:
        raise PromptError(
            f"{gguf} has no chat template. Name the format the model was trained with: --format {'|'.join(prompts.FORMATS)}"
        )
    settings, system = known or (prompts.CHATML, None)
    template, stop, notes = None, list(settings.stop) if known else [], []
    if known:
        bos, eos, adds_bos = prompts.token_text(fields, "bos"), prompts.token_text(fields, "eos"), _adds_bos(fields)
        template = settings.go(bos, eos, adds_bos=adds_bos)
        if adds_bos and bos and prompts.render(settings.jinja, [_QUESTION]).startswith(bos):
            notes.append(f"{bos} opens every turn, and the tokenizer puts one more first: Ollama's prompts begin with two")
    else:
        notes.append("the chat template is none that cnq can say in Go: TEMPLATE is left out, which takes Ollama 0.30 or newer")
    if format and jinja and own != known and "tool" in jinja:
        notes.append(
            "Ollama 0.30 and newer may prefer the GGUF's own template, which knows tools: set OLLAMA_GO_TEMPLATE=1 there"
        )
    end = _ending(settings if known else jinja or "", fields)
    if end and end.warning:
        notes.append(end.warning)
        stop = list(dict.fromkeys((*stop, end.text)))
    trained = fields.get(f"{file.arch}.context_length")
    license = fields.get("general.license.name") or fields.get("general.license")
    return Recipe(
        gguf=gguf,
        format=settings.name if known else None,
        template=template,
        system=system,
        license=license if isinstance(license, str) else None,
        parameters={
            "num_ctx": min(MAX_CTX, trained) if isinstance(trained, int) else MAX_CTX,
            "temperature": settings.temperature,
            "repeat_penalty": settings.repeat_penalty,  # said because Ollama's default went from 1.1 to 1.0 in v0.32.10
            **settings.parameters,
            **({"stop": stop} if stop else {}),
        },
        notes=tuple(notes),
    )


def _adds_bos(fields: dict[str, Any]) -> bool:
    """Whether llama.cpp puts bos before a text: as the GGUF says, or by the kind of tokenizer."""
    pre, model = fields.get("tokenizer.ggml.pre"), fields.get("tokenizer.ggml.model")
    return bool(fields.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in _ADD_BOS))


def _ending(template: prompts.Format | str, fields: dict[str, Any]) -> prompts.Ending | None:
    """The end of its answers. Raises PromptError for a template that cannot even render a question."""
    try:
        return prompts.ending(template, fields)
    except PromptError:
        if isinstance(template, str):
            prompts.render(template, [_QUESTION])
        return None


def modelfile(recipe: Recipe, folder: Path) -> str:
    """The Modelfile in `folder`, with REQUIRES left out: older versions of Ollama refuse a file that has it.

    Raises OllamaError.
    """
    here = recipe.gguf.resolve()
    source = f"./{here.name}" if here.parent == folder.resolve() else str(here)
    if kept(source) != source:
        raise OllamaError(
            f"{source} has characters in its name that Ollama drops ({_named(source)}), so that it would not find the file. "
            "Rename it, or make the model with --create."
        )
    commands = [Command("from", source)]
    for name in ("template", "system", "license"):
        if value := getattr(recipe, name):
            commands.append(Command(name, value))
    for key, value in recipe.parameters.items():
        values = value if isinstance(value, list) else [value]
        commands += [Command("parameter", str(v), key) for v in values]
    return "\n".join(map(written, commands)) + "\n"


def _dropped(text: str) -> list[str]:
    if kept(text) == text:
        return []
    return [f"Ollama drops {_named(text)} from SYSTEM when it reads a Modelfile; a model made with --create keeps them"]


def _named(text: str) -> str:
    return ", ".join(f"U+{ord(c):04X}" for c in sorted(set(text) - set(kept(text))))

"""Texts that a command names, as it takes them: plain, or conversations in the model's own prompt format."""

import re
from collections.abc import Sequence
from pathlib import Path

from . import prompts
from .corpus import Source, read_source
from .gguf_file import GgufFile


def named_sources(gguf: Path, texts: Sequence[str], format: str | None = None) -> tuple[list[Source], bool]:
    """The texts named, FILE or FILE=WEIGHT; and whether special tokens in them are meant.

    Conversations are put in `format`, None = in the prompt format of the GGUF. Raises CorpusError, PromptError.
    """
    fields = GgufFile(gguf).fields
    jinja = prompts.named(format).jinja if format else prompts.template_of(fields)
    bos, eos = prompts.token_text(fields, "bos"), prompts.token_text(fields, "eos")

    def rendered(messages: list[prompts.Message]) -> str:
        assert jinja
        text = prompts.render(jinja, messages, bos=bos, eos=eos, add_generation_prompt=False)
        return text.removeprefix(bos)  # the tokenizer adds it

    render = rendered if jinja else None
    named = [re.fullmatch(r"(.*?)(?:=([\d.]+))?", text) for text in texts]
    sources = [read_source(Path(m[1]), render, float(m[2] or 1)) for m in named if m]
    return sources, any(s.name.endswith((".json", ".jsonl", ".parquet")) for s in sources)

"""A conversation through a Jinja template, which may come from anywhere; and which of the formats a template is."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from .formats import FORMATS, Format

if TYPE_CHECKING:
    from jinja2 import Template

Message = dict[str, str]  # role: system, user or assistant; content


def render(jinja: str, messages: Sequence[Message], *, bos: str = "", eos: str = "", add_generation_prompt: bool = True) -> str:
    """The conversation as text, with the beginning-of-text token as text where the template puts it.

    Templates come with models from anywhere: they run in jinja2's immutable sandbox, set up as transformers does.
    Raises PromptError when the template refuses the conversation or cannot run.
    """
    from jinja2 import TemplateError

    try:
        return _compiled(jinja).render(
            messages=list(messages), tools=None, documents=None, bos_token=bos, eos_token=eos,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise PromptError(f"the model's chat template cannot be rendered: {error}. Choose a format with --format.") from error


@lru_cache(16)
def _compiled(jinja: str) -> "Template":
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks answers for transformers' training and prints nothing."""

        tags = {"generation"}  # noqa: RUF012, as jinja2 wants it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(jinja)


def _tojson(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    """jinja2's own is for HTML, and escapes < and >."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


def _refuse(message: str) -> None:
    raise PromptError(f"the model's chat template refuses this conversation: {message}")


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def of_template(jinja: str) -> tuple[Format, str | None] | None:
    """(format, system text the template adds by itself) when a Jinja template says what one of FORMATS says, else None.

    Told by what it renders, not by its text: two conversations must come out alike.
    """
    conversations: list[list[Message]] = [
        [{"role": "system", "content": "SYS"}, {"role": "user", "content": "甲"}],
        [{"role": "system", "content": "SYS"}, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "乙。"},
         {"role": "user", "content": "c"}],
    ]  # fmt: skip

    def rendered(template: str, messages: list[Message]) -> str:
        return render(template, messages, bos="<bos>", eos="</s>").removeprefix("<bos>")

    try:
        said = [rendered(jinja, c) for c in conversations]
    except PromptError:
        return None
    for candidate in FORMATS.values():
        if said == [rendered(candidate.jinja, c) for c in conversations]:
            return candidate, _own_system(jinja, candidate)
    return None


def _own_system(jinja: str, candidate: Format) -> str | None:
    """The system text that a template adds when the conversation has none."""
    user: Message = {"role": "user", "content": "甲"}
    try:
        bare = render(jinja, [user]).removeprefix("<bos>")
    except PromptError:
        return None
    marked = render(candidate.jinja, [{"role": "system", "content": "\0"}, user])
    before, after = marked.split("\0")
    if bare.startswith(before) and bare.endswith(after) and len(bare) >= len(before) + len(after):
        return bare[len(before) : len(bare) - len(after)] or None
    return None


def template_of(fields: dict[str, Any]) -> str | None:
    """A GGUF's own chat template, the default one where there are several."""
    template = fields.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def token_text(fields: dict[str, Any], name: str) -> str:
    """The text of a GGUF's special token: bos, eos. Empty when it names none."""
    id, tokens = fields.get(f"tokenizer.ggml.{name}_token_id"), fields.get("tokenizer.ggml.tokens")
    return tokens[id] if isinstance(tokens, list) and isinstance(id, int) and 0 <= id < len(tokens) else ""

"""A conversation as text: on the page, and in a file."""

import json
import re
from collections.abc import Sequence

from ..prompts import Message
from .words import say


def as_json(model: str, messages: Sequence[Message]) -> str:
    """As OpenAI's clients write it, so that it can be sent to `cnq serve` as it is."""
    return json.dumps({"model": model, "messages": list(messages)}, ensure_ascii=False, indent=2) + "\n"


def as_markdown(model: str, messages: Sequence[Message], language: str) -> str:
    names = {"system": "system_role", "user": "user", "assistant": "assistant"}
    parts = [f"## {say(names[m['role']], language)}\n\n{m['content'].strip()}\n" for m in messages]
    return "\n".join([f"# {model}\n", *parts])


def displayed(text: str) -> str:
    """Markdown that shows `<` and `&` as they are, where Gradio would read HTML: vector<int>, the tag <table>.

    Code, whole or not yet closed, is left alone: nothing is HTML there.
    """
    parts = re.split(r"(^ {0,3}```.*?(?:^ {0,3}```|\Z)|(`+)(?!`).*?(?<!`)\2(?!`))", text, flags=re.M | re.S)
    return "".join(re.sub(r"(?<!\\)([<&])", r"\\\1", part) if i % 3 == 0 else part for i, part in enumerate(parts) if i % 3 < 2)

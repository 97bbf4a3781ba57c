"""A conversation as a file."""

import json
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

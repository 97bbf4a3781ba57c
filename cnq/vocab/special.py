"""Which tokens begin, end and pad a text, whether encoding adds them, and the chat template."""

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .vocab import Vocab

_NAMES = ("bos", "eos", "unk", "sep", "pad", "mask")


def add_special(vocab: Vocab, folder: Path) -> None:
    """Fill in vocab.special, vocab.add and vocab.chat_template from the tokenizer's files.

    A token named by its text in tokenizer_config.json counts before an id in config.json: early conversions of LLaMA
    carry wrong ids there (bos 0, eos 1), and a chat with such a model never stops.
    """
    tokenizer_config = read(folder / "tokenizer_config.json")
    config = read(folder / "config.json")
    for name in _NAMES:
        id = _by_text(vocab, tokenizer_config.get(f"{name}_token"))
        if id is None:
            id = vocab.special.get(name, config.get(f"{name}_token_id"))
        if isinstance(id, int) and 0 <= id < len(vocab.tokens):
            vocab.special[name] = id
    vocab.special = {name: vocab.special[name] for name in _NAMES if name in vocab.special}
    vocab.add |= _added(vocab, read(folder / "tokenizer.json"), tokenizer_config)
    vocab.chat_template = _chat_template(folder, tokenizer_config)


def read(path: Path) -> dict[str, Any]:
    """A JSON object, {} when there is no such file. Raises CheckpointError when it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object. Download it again.")
    return value


def _by_text(vocab: Vocab, entry: str | dict[str, Any] | None) -> int | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return vocab.tokens.index(text) if text and text in vocab.tokens else None


def _added(vocab: Vocab, tokenizer: dict[str, Any], tokenizer_config: dict[str, Any]) -> dict[str, bool]:
    """Whether encoding puts bos first and eos last.

    tokenizer.json's post-processor is what HF's tokenizers run, so it counts before the flags of tokenizer_config.json.
    """
    added: dict[str, bool] = {}
    post = tokenizer.get("post_processor") or {}
    for step in post.get("processors", [post] if post else []):
        if step.get("type") == "ByteLevel":
            added.setdefault("bos", False)
            added.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing" and step.get("single"):
            single = step["single"]
            for name, end in (("bos", single[0]), ("eos", single[-1])):
                text = end.get("SpecialToken", {}).get("id")
                added[name] = text is not None and _by_text(vocab, text) == vocab.special.get(name)
    for name in ("bos", "eos"):
        flag = tokenizer_config.get(f"add_{name}_token")
        if name not in added and isinstance(flag, bool):
            added[name] = flag
    return added


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """transformers' order: chat_template.jinja, tokenizer_config.json, chat_template.json."""
    if (jinja := folder / "chat_template.jinja").is_file():
        default = jinja.read_text(encoding="utf-8")
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if not more:
            return default
        named = [{"name": p.stem, "template": p.read_text(encoding="utf-8")} for p in more]
        return [{"name": "default", "template": default}, *named]
    template = tokenizer_config.get("chat_template") or read(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list) and not all(isinstance(t[key], str) for t in template for key in ("name", "template")):
        raise ValueError("a chat template without name or text")
    return template if isinstance(template, str | list) else None

"""What a GGUF says of a tokenizer, in the order and under the names that llama.cpp reads."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import gguf


class Kind(IntEnum):
    """tokenizer.ggml.token_type; SentencePiece numbers its pieces alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Vocab:
    """A tokenizer.

    model: "llama" (SentencePiece, merged by score) or "gpt2" (byte-level BPE, merged by rank).
    pre: llama.cpp's name for the pre-tokenizer.
    tokens, kinds: by id. scores: of "llama". merges: "left right", in order, of "gpt2".
    special: "bos", "eos", "unk", "sep", "pad", "mask" -> id. add: "bos", "eos" -> whether encoding adds it.
    chat_template: Jinja text, or [{"name": …, "template": …}, …].
    notes: what the user should know of the tokenizer.
    n_tokens: highest id of a real token + 1; `tokens` may be longer (placeholders) or, before it is refused, shorter.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[Kind]
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)
    add_space_prefix: bool | None = None
    chat_template: str | list[dict[str, str]] | None = None
    notes: list[str] = field(default_factory=list)
    n_tokens: int = 0

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types([int(k) for k in self.kinds])
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, id in self.special.items():
            getattr(writer, f"add_{name}_token_id")(id)
        for name, adds in self.add.items():
            getattr(writer, f"add_add_{name}_token")(adds)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)

    def fields(self) -> dict[str, Any]:
        """What a GGUF's metadata says of it."""
        writer = gguf.GGUFWriter(path=None, arch="")
        self.add_to(writer)
        return {key: entry.value for key, entry in writer.kv_data[0].items() if key.startswith("tokenizer.")}

    def has_row(self, id: int, rows: int) -> bool:
        """Whether the embedding has a row for the token. Those it lacks are counted, and refused by vocab.load."""
        if id < 0:
            raise ValueError(f"a token of id {id}")
        self.n_tokens = max(self.n_tokens, id + 1)
        return id < rows

    def set(self, id: int, token: str, kind: Kind, score: float) -> None:
        self.tokens[id] = token
        self.kinds[id] = kind
        if self.scores is not None:
            self.scores[id] = score


def placeholder(id: int) -> str:
    """The name of an id that no token has: embeddings are padded to round sizes."""
    return f"[PAD{id}]"


def looks_special(token: str) -> bool:
    """Added tokens that some models forget to mark as special, by the reference converter's rule."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))  # DeepSeek's full-width bars
        or (token.startswith("<unused") and token.endswith(">"))
    )


def added_kind(token: str, entry: dict[str, Any]) -> tuple[str, Kind]:
    """(text, kind) of an added token: special ones are controls; in the others a "▁" stands for a space."""
    if entry.get("special") or looks_special(token):
        return token, Kind.CONTROL
    return token.replace("▁", " "), Kind.USER_DEFINED

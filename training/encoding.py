"""A Hugging Face tokenizer as training uses it: what stands around a text, where its tokens begin, and how to know it again."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from cnq.errors import CheckpointError

_BATCH = 1 << 20  # characters given to the tokenizer at once


@dataclass(frozen=True)
class Encoded:
    """starts, ends: of each token in its text, in characters. Tokens that share a character all have it."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class Encoder:
    """bos: what the tokenizer puts before a text by itself, at most one token. eos: what ends a document."""

    def __init__(self, tokenizer: Any):
        """Raises CheckpointError: the tokenizer is a slow one, which cannot say where tokens begin, or it has no eos."""
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError(
                f"{tokenizer.name_or_path}: its tokenizer is a slow one, which cannot say where tokens begin. Expected a "
                "tokenizer.json: python -m training.merge_tokenizer writes one, save_pretrained of a fast tokenizer too."
            )
        if tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"{tokenizer.name_or_path}: its tokenizer has no eos_token. Name it in tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        added = tokenizer("").input_ids[:1]
        self.bos: list[int] = [id for id in added if id == tokenizer.bos_token_id]
        self.special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
            tokenizer.all_special_ids
        )

    def encode(self, texts: Sequence[str], *, special: bool) -> list[Encoded]:
        """Without bos and eos around. special: the texts of special tokens are those tokens, else they are text like any."""
        if not texts:
            return []
        out = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=not special, return_offsets_mapping=True,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        return [
            Encoded(ids, [start for start, _ in spans], [end for _, end in spans])
            for ids, spans in zip(out["input_ids"], out["offset_mapping"], strict=True)
        ]

    def ids(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Of texts without special tokens, as `encode`, many at once and in order."""
        for batch in batches(texts):
            yield from self.tokenizer(
                batch, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
                return_token_type_ids=False, verbose=False,
            )["input_ids"]  # fmt: skip

    def digest(self) -> str:
        """sha256 of all that decides how texts are encoded."""
        model = self.tokenizer.backend_tokenizer.to_str()  # without truncation and padding, which the last call has reset
        said = json.dumps([model, self.bos, self.eos, sorted(self.special)])
        return hashlib.sha256(said.encode()).hexdigest()


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in turn, as many at once as have some _BATCH characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 1
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def bytes_of(text: str, encoded: Encoded) -> list[int]:
    """UTF-8 bytes of text that each token stands for; together those of the text.

    A character that several tokens share counts where it begins; a space that the tokenizer puts in front has no bytes.
    """
    at = [0, *accumulate(len(c.encode()) for c in text)]
    seen, sizes = 0, []
    for end in encoded.ends:
        sizes.append(max(0, at[end] - seen))
        seen = max(seen, at[end])
    return sizes

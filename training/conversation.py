"""A conversation as tokens, with labels where a model has to write: the answers and what ends them.

What is learned comes from cnq.prompts.segments alone; the texts are tokenised together, as inference does it, so that a model
is asked what it has learned to answer. A token is learned when its first character is.

One thing would still differ: where the end of a prompt and the beginning of its answer make one token. A chat ends in the
prompt's own tokens, which the model would never have seen: after "### Response: " and "The" the tokens are ":" and " The", in
a chat ":" and " ". There the prompt is tokenised by itself, and the rest of that token after it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tokenizers import decoders
from tokenizers.pre_tokenizers import ByteLevel

from cnq.prompts import Format, Message, segments

from .batches import UNLEARNED
from .encoding import Encoded, Encoder, bytes_of
from .pieces import SPACE

_AS_BYTES = ByteLevel(add_prefix_space=False, use_regex=False)


@dataclass(frozen=True)
class Tokens:
    """labels: as input_ids, or -100; the first is -100, for nothing predicts it. sizes: UTF-8 bytes; of special tokens 0."""

    input_ids: list[int]
    labels: list[int]
    sizes: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, part: slice) -> "Tokens":
        labels = self.labels[part]
        return Tokens(self.input_ids[part], [UNLEARNED, *labels[1:]] if labels else [], self.sizes[part])

    @property
    def learned(self) -> int:
        return sum(label != UNLEARNED for label in self.labels)

    @property
    def nbytes(self) -> int:
        """Of what is learned."""
        return sum(size for size, label in zip(self.sizes, self.labels, strict=True) if label != UNLEARNED)


class Formatter:
    """template: a format of cnq.prompts, or a Jinja template."""

    def __init__(self, encoder: Encoder, template: Format | str):
        self.encoder = encoder
        self._template = template
        self._bos, self._eos = encoder.tokenizer.bos_token or "", encoder.tokenizer.eos_token or ""

    def split(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """(text, learned) in turn, without the bos that the tokenizer puts first. Raises PromptError."""
        parts = segments(self._template, messages, bos=self._bos, eos=self._eos)
        if self.encoder.bos and parts:
            (first, learned), *rest = parts
            parts = [(first.removeprefix(self._bos), learned), *rest]
        return parts

    def tokens(self, conversations: Sequence[list[tuple[str, bool]]]) -> list[Tokens]:
        """Of conversations that were split."""
        texts = ["".join(text for text, _ in parts) for parts in conversations]
        encoded = self.encoder.encode(texts, special=True)
        return [self._labelled(*each) for each in zip(texts, conversations, encoded, strict=True)]

    def text(self, text: str) -> Tokens:
        """A text that is no conversation, bos and eos around it: all of it is learned."""
        (encoded,) = self.encoder.encode([text], special=False)
        bos, eos = self.encoder.bos, [self.encoder.eos]
        ids = [*bos, *encoded.ids, *eos]
        return Tokens(ids, ids, [*(0 for _ in bos), *bytes_of(text, encoded), 0])[:]

    def _labelled(self, text: str, parts: list[tuple[str, bool]], encoded: Encoded) -> Tokens:
        edges = [0, *accumulate(len(part) for part, _ in parts)]
        for (_, learned), edge in zip(parts, edges, strict=False):
            if learned and edge:
                encoded = self._divided(text, encoded, edge)
        labels, bos = [], self.encoder.bos
        for id, start in zip(encoded.ids, encoded.starts, strict=True):
            part = min(bisect_right(edges, start), len(parts)) - 1
            labels.append(id if parts[part][1] else UNLEARNED)
        sizes = [
            0 if id in self.encoder.special else size for id, size in zip(encoded.ids, bytes_of(text, encoded), strict=True)
        ]
        front = [UNLEARNED for _ in bos]
        return Tokens([*bos, *encoded.ids], [*front, *labels], [*(0 for _ in bos), *sizes])[:]

    def _divided(self, text: str, encoded: Encoded, edge: int) -> Encoded:
        """With no token on both sides of `edge`: before it are the tokens of the text that ends there."""
        across = [i for i, (a, b) in enumerate(zip(encoded.starts, encoded.ends, strict=True)) if a < edge < b]
        if len(across) != 1:
            return encoded
        i = j = across[0]
        rest = self._rest(encoded.ids[i], text[encoded.starts[i] : edge], text[edge : encoded.ends[i]])
        (before,) = self.encoder.encode([text[:edge]], special=True)
        while j and (encoded.starts[j] == encoded.starts[j - 1] or encoded.starts[j] not in before.starts):
            j -= 1
        k = before.starts.index(encoded.starts[j]) if j else 0
        return Encoded(
            [*encoded.ids[:j], *before.ids[k:], *rest, *encoded.ids[i + 1 :]],
            [*encoded.starts[:j], *before.starts[k:], *(edge for _ in rest), *encoded.starts[i + 1 :]],
            [*encoded.ends[:j], *before.ends[k:], *(encoded.ends[i] for _ in rest), *encoded.ends[i + 1 :]],
        )

    def _rest(self, token: int, before: str, behind: str) -> list[int]:
        """The tokens of `behind` alone, where one token stands for `before` and (the beginning of) `behind`."""
        tokenizer = self.encoder.tokenizer
        piece = tokenizer.convert_ids_to_tokens(token)
        as_bytes = "".join(part for part, _ in _AS_BYTES.pre_tokenize_str(before))
        if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
            rest = piece[len(as_bytes) :]
        else:
            rest = behind.replace(" ", SPACE)
        return [part.id for part in tokenizer.backend_tokenizer.model.tokenize(rest)]

"""Conversations made to fit into a number of tokens, as a chat does it: it forgets its oldest turns, but not the system text.

1. The oldest rounds go, until the rest fits or one round is left.
2. The question loses its beginning, down to a quarter of max_length.
3. The answer loses its end, with the token that ends it. Where no token of it fits, the conversation is dropped.

Texts that are no conversations lose nothing: they are cut into as many examples as they need.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cnq.errors import PromptError
from cnq.prompts import Message
from cnq.records import Record

from .conversation import Formatter, Tokens

TooLong = Literal["cut", "drop"]
_BATCH = 500  # records tokenised at once
_QUARTER = 4


@dataclass(frozen=True)
class Fitted:
    """examples: of one record, none when it was dropped. cut: something was lost; answer_cut: of an answer's end."""

    examples: tuple[Tokens, ...]
    cut: bool = False
    answer_cut: bool = False


class Fitting:
    """too_long: what becomes of a conversation of more than max_length tokens."""

    def __init__(self, formatter: Formatter, max_length: int, too_long: TooLong = "cut"):
        self.formatter = formatter
        self.max_length = max_length
        self.too_long = too_long

    def all(self, items: Sequence[Record]) -> Iterator[Fitted]:
        """Each in turn. Raises PromptError, which names the record, when the template refuses a conversation."""
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            talks = iter(self.formatter.tokens([self._split(item) for item in batch if item.text is None]))
            for item in batch:
                yield self._of_text(item.text) if item.text is not None else self._of_conversation(item, next(talks))

    def _split(self, item: Record) -> list[tuple[str, bool]]:
        try:
            return self.formatter.split(item.messages)
        except PromptError as error:
            raise PromptError(f"{item.where}: {error}") from error

    def _of_text(self, text: str) -> Fitted:
        whole = self.formatter.text(text)
        parts = [whole[start : start + self.max_length] for start in range(0, len(whole), self.max_length)]
        return Fitted(tuple(part for part in parts if part.learned))

    def _of_conversation(self, item: Record, tokens: Tokens) -> Fitted:
        if len(tokens) <= self.max_length:
            return Fitted((tokens,) if tokens.learned else ())
        if self.too_long == "drop":
            return Fitted(())
        shorter = self._without_rounds(item.messages)
        tokens = self._tokens(shorter)
        if len(tokens) > self.max_length:
            tokens = self._with_less_question(shorter)
        answer_cut = len(tokens) > self.max_length
        tokens = tokens[: self.max_length]
        return Fitted((tokens,), cut=True, answer_cut=answer_cut) if tokens.learned else Fitted(())

    def _tokens(self, messages: Sequence[Message]) -> Tokens:
        (tokens,) = self.formatter.tokens([self.formatter.split(messages)])
        return tokens

    def _without_rounds(self, messages: Sequence[Message]) -> list[Message]:
        """The last rounds that fit, at least one; with all of the system text."""
        roles = [m["role"] for m in messages]
        answered = [i for i in range(1, len(roles)) if roles[i] != "assistant" and roles[i - 1] == "assistant"]
        system = [i for i, role in enumerate(roles) if role == "system"]

        def since(first: int) -> list[Message]:
            return [messages[i] for i in range(len(messages)) if i >= first or i in system]

        fits = bisect_left(answered, True, key=lambda first: len(self._tokens(since(first))) <= self.max_length)
        return since(answered[min(fits, len(answered) - 1)]) if answered else list(messages)

    def _with_less_question(self, messages: list[Message]) -> Tokens:
        """Without the beginning of the question that is answered, nor questions before it; no more is taken than has to be."""
        answer = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        asked = [i for i, m in enumerate(messages[:answer]) if m["role"] == "user"]
        messages = [m for i, m in enumerate(messages) if i not in asked[:-1]]
        tokens = self._tokens(messages)
        if not asked:
            return tokens
        question = messages[at := asked[-1] - len(asked) + 1]["content"]
        (encoded,) = self.formatter.encoder.encode([question], special=True)
        starts = [*encoded.starts, len(question)]
        excess, spare = len(tokens) - self.max_length, 0  # shortened, it may be cut into tokens otherwise
        most = max(0, len(encoded.ids) - self.max_length // _QUARTER)
        n = 0
        while len(tokens) > self.max_length and n < most:
            n = min(excess + spare, most)
            shorter: Message = {"role": "user", "content": question[starts[n] :]}
            tokens = self._tokens([*messages[:at], shorter, *messages[at + 1 :]])
            spare = 2 * spare + 1
        return tokens

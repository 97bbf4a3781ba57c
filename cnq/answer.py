"""One answer to a prompt: pieces of whole characters, where and why it ends, and how likely its tokens were."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .chat import characters, until
from .engine.model import Model, Sampling
from .errors import Interrupted


@dataclass(frozen=True)
class Ask:
    """A prompt and how to answer it. stop, end: texts and a token that end the answer, besides the model's own end tokens.

    logprobs: how many alternatives to score at each token; None = no scores. lstrip: no white space before the answer, as in
    a chat.
    """

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...] = ()
    end: int | None = None
    logprobs: int | None = None
    lstrip: bool = False


@dataclass(frozen=True)
class Scored:
    """A token, its natural log probability by the model alone, whatever the sampling, and the likeliest alternatives.

    at: characters of the answer before it.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    at: int


@dataclass(frozen=True)
class Piece:
    text: str
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class End:
    """reason: "stop", or "length" when the answer was cut: at max_tokens, by the end of the context, or by an interruption.

    n_tokens: of the answer. n_held: tokens of the prompt that were in the context already.
    """

    reason: str
    n_tokens: int
    n_held: int


def answer(model: Model, ask: Ask, sharing: Callable[[], int]) -> Iterator[Piece | End]:
    """Yield the pieces of an answer, then its End. sharing: asked before each token how many compute at the same time.

    A token's score comes with the piece that its text begins in. Raises EngineError when the prompt does not fit.
    """
    run = _Run(model, ask, sharing)
    n_held = model.holds(ask.prompt[:-1])
    shown, begun = 0, not ask.lstrip
    for text in until(ask.stop, run.texts()):
        shown += len(text)
        text = text if begun else text.lstrip()
        begun = begun or bool(text)
        if text:
            yield Piece(text, run.scored_before(shown))
    if run.cut and (scored := run.scored_before(shown + 1)):  # of a character that was cut off
        yield Piece("", scored)
    yield End("length" if run.cut else "stop", run.n, n_held)


class _Run:
    """The tokens of an answer as they are drawn. n: how many so far. cut: whether they ended before the model's own end."""

    def __init__(self, model: Model, ask: Ask, sharing: Callable[[], int]):
        self.model, self.ask, self.sharing = model, ask, sharing
        self.n, self.cut = 0, False
        self._read = 0  # characters
        self._scored: list[Scored] = []

    def texts(self) -> Iterator[str]:
        for text in characters(self._pieces()):
            self._read += len(text)
            yield text

    def _pieces(self) -> Iterator[bytes]:
        limit = min(self.ask.max_tokens, self.model.n_ctx - len(self.ask.prompt))
        self.model.share_threads(self.sharing())
        try:
            for token in self.model.generate(self.ask.prompt, self.ask.sampling, self.ask.max_tokens):
                if token == self.ask.end:
                    return
                self.n += 1
                if self.ask.logprobs is not None:
                    self._scored.append(_score(self.model.last_logits(), token, self.ask.logprobs, self._read))
                yield self.model.piece(token)
                self.model.share_threads(self.sharing())
            self.cut = self.n == limit
        except Interrupted:
            self.cut = True

    def scored_before(self, at: int) -> tuple[Scored, ...]:
        """Take the scores of tokens that begin before a character."""
        n = sum(s.at < at for s in self._scored)
        taken, self._scored = tuple(self._scored[:n]), self._scored[n:]
        return taken


def _score(logits: np.ndarray, token: int, n_top: int, at: int) -> Scored:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    best = np.argpartition(-wide, n_top)[:n_top] if n_top else np.empty(0, np.int64)
    top = tuple((int(i), float(wide[i])) for i in best[np.argsort(-wide[best], kind="stable")])
    return Scored(token, float(wide[token]), top, at)

"""A conversation with a GGUF: its prompt format, streaming that never shows half a character, and where to stop."""

import codecs
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from . import prompt_cache, prompts
from .context import choose_context
from .engine.model import Model, Sampling
from .errors import CnqError, Interrupted, PromptError
from .gguf_file import GgufFile
from .prompts import Message
from .tuning import best

MAX_TOKENS = 1024  # of an answer
_LEAST = 16  # tokens that must be left for one


@dataclass(frozen=True)
class Style:
    """How to talk with a model. jinja: its template. stop: text that ends an answer, besides the model's own end tokens.

    end: the template's end token where the model does not count it as one. It has no text to be seen in an answer.
    """

    jinja: str
    stop: tuple[str, ...]
    sampling: Sampling
    end: int | None = None


def style_of(fields: dict[str, Any], path: Path, format: str | None) -> Style:
    """The format named, or else the GGUF's own template. Raises PromptError when there is neither."""
    jinja = prompts.template_of(fields)
    if format:
        known: prompts.Format | None = prompts.named(format)
    elif jinja:
        found = prompts.of_template(jinja)
        known = found[0] if found else None
    else:
        raise PromptError(
            f"{path} has no chat template. Name the format the model was trained with: --format {'|'.join(prompts.FORMATS)}"
        )
    sampling = Sampling(temperature=known.temperature, repeat_penalty=known.repeat_penalty) if known else Sampling()
    template = known.jinja if format and known else jinja
    assert template
    stop, end = known.stop if known else (), None
    with suppress(PromptError):  # a template that cannot render any answer still may render questions
        end = prompts.ending(template, fields)
    if end and not end.counted:
        return Style(template, tuple(dict.fromkeys((*stop, end.text))), sampling, end.token)
    return Style(template, stop, sampling)


@dataclass(frozen=True)
class Answer:
    """How an answer went.

    ended: by itself ("end"), at max_tokens ("length"), because the context was full ("context"), or broken off ("stopped").
    n_prompt: tokens before it, of which n_read were computed for it. n_tokens: its own.
    first: seconds to its first token. speed: tokens a second after that, 0 for fewer than two.
    """

    ended: str
    n_prompt: int
    n_read: int
    n_tokens: int
    first: float
    speed: float


class Chat:
    """A conversation; `messages` may be changed between answers.

    The model sees the system text, the first message if there is one, and the messages from number `start` on: when the
    context is full the oldest turns go. notes: what the user should know, to be shown and removed. last: the last answer's,
    None when nothing was answered. n_prompt: tokens of the last prompt, known while the model reads it.
    """

    def __init__(
        self,
        model: Model,
        style: Style,
        system: str | None = None,
        *,
        sampling: Sampling | None = None,
        max_tokens: int = MAX_TOKENS,
        cached: bool = False,
        format: str | None = None,
    ):
        """cached: whether what comes before the first question is kept in the prompt cache, and taken from there.
        format: what the style was named by, for those who keep the conversation."""
        self.model, self.style, self.format = model, style, format
        self.sampling = sampling or style.sampling
        self.max_tokens, self.cached = max_tokens, cached
        self.notes: list[str] = []
        self.last: Answer | None = None
        self.n_prompt = 0
        self.messages: list[Message] = []
        self.start = 0
        self.system = system

    @property
    def system(self) -> str | None:
        return self.messages[0]["content"] if self._first else None

    @system.setter
    def system(self, text: str | None) -> None:
        self.messages[: self._first] = [{"role": "system", "content": text}] if text else []
        self.start = self._first

    @property
    def _first(self) -> int:
        """The number of the first message that is no system text."""
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer to `text` in pieces of whole characters; both join the conversation, also when it is broken off.

        A question does not join when nothing was answered yet, or when it raises PromptError: it does not fit, or the
        template refuses it. Model.interrupt, from another thread, breaks an answer off; so does closing the iterator.
        """
        self.messages.append({"role": "user", "content": text})
        self.last, self.n_prompt = None, 0
        started = time.perf_counter()
        try:
            prompt = self._prompt()
            self.n_prompt = len(prompt)
            held = self._warm(prompt)
        except BaseException as error:
            self.messages.pop()
            if isinstance(error, Interrupted):
                return
            raise
        generated = self.model.generate(prompt, self.sampling, self.max_tokens)
        tokens = _Timed(takewhile(lambda token: token != self.style.end, generated))
        answer, ended = "", "stopped"
        try:
            for piece in until(self.style.stop, characters(self.model.piece(t) for t in tokens)):
                piece = piece if answer else piece.lstrip()
                answer += piece
                if piece:
                    yield piece
            full = tokens.n >= self.model.n_ctx - len(prompt)
            if full:
                self.notes.append("the context is full. Ask to go on: the oldest turns are forgotten then.")
            ended = "context" if full else "length" if tokens.n >= self.max_tokens else "end"
        except Interrupted:
            pass
        finally:
            if answer or ended != "stopped":
                self.messages.append({"role": "assistant", "content": answer.rstrip()})
            else:
                self.messages.pop()
            first = tokens.first - started if tokens.n else 0.0
            self.last = Answer(ended, len(prompt), len(prompt) - held, tokens.n, first, tokens.speed)

    def again(self) -> Iterator[str]:
        """Take the last answer back and yield another. Raises PromptError when there is none."""
        question = self.undo()
        if question is None:
            raise PromptError("there is no answer yet that could be given again.")
        return self.ask(question)

    def undo(self) -> str | None:
        """Take the last question and its answer back: the question, or None when there is none."""
        asked = [i for i in range(self._first, len(self.messages)) if self.messages[i]["role"] == "user"]
        if not asked:
            return None
        question = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        self.start = self._first
        return question

    def reset(self) -> None:
        """Forget all but the system text."""
        del self.messages[self._first :]
        self.start, self.last = self._first, None

    def used(self) -> int:
        """Tokens that the next question adds to; 0 when the template makes nothing of the conversation so far."""
        try:
            return len(self._tokens(self.start))
        except PromptError:
            return 0

    def _prompt(self) -> list[int]:
        """The tokens to go on from. When they leave no room for an answer, the oldest turns go, and with them as many as make
        half the context free: each time that happens, the rest has to be computed again."""
        n_ctx = self.model.n_ctx
        self._refuse_beyond_all(n_ctx)
        room = n_ctx - min(self.max_tokens, n_ctx // 4)
        tokens = self._tokens(self.start)
        if len(tokens) <= room:
            return tokens
        alone = self._tokens(len(self.messages) - 1)
        if len(alone) > n_ctx - _LEAST:
            raise PromptError(
                f"the question is {len(alone)} tokens with all that goes before it, the context {n_ctx}. "
                "Shorten it, or start with a larger --ctx."
            )
        turns = [i for i in range(self.start + 1, len(self.messages)) if self.messages[i]["role"] == "user"]
        fitting = ((i, tokens) for most in (n_ctx // 2, room) for i in turns if len(tokens := self._tokens(i)) <= most)
        start, tokens = next(fitting, (len(self.messages) - 1, alone))
        gone = sum(m["role"] == "user" for m in self.messages[self.start : start])
        if gone:
            turn = "oldest turn" if gone == 1 else f"{gone} oldest turns"
            self.notes.append(f"the context of {n_ctx} tokens is full: the model forgets the {turn}")
        self.start = start
        return tokens

    def _refuse_beyond_all(self, n_ctx: int) -> None:
        """Raise PromptError for a question that could not fit if it were made of the longest tokens: to tokenize it may take
        minutes (llama.cpp's time grows with the square of the special tokens in a text)."""
        size = len(self.messages[-1]["content"].encode("utf-8", "replace"))
        least = size // max(1, self.model.longest_token)
        if least > n_ctx:
            raise PromptError(
                f"the question is {size} bytes, at least {least} tokens, the context {n_ctx}. "
                "Shorten it, or start with a larger --ctx."
            )

    def _tokens(self, start: int) -> list[int]:
        return prompt_tokens(self.model, self.style, [*self.messages[: self._first], *self.messages[start:]])

    def _warm(self, prompt: list[int]) -> int:
        """Bring what does not depend on the question into the context, from the prompt cache or for it: how many tokens of the
        prompt were known already."""
        held = self.model.holds(prompt[:-1])
        if not self.cached or held >= len(prefix := self._prefix(prompt)):
            return held
        held = prompt_cache.restore(self.model, prefix)
        try:
            prompt_cache.store(self.model, prefix)
        except Interrupted:
            raise
        except CnqError as error:
            self.cached = False
            self.notes.append(f"nothing is kept for the next start: {error}")
        return held

    def _prefix(self, prompt: list[int]) -> list[int]:
        """The first tokens of the prompt that two unlike questions have in common with it."""
        system = self.messages[: self._first]
        others = [prompt_tokens(self.model, self.style, [*system, {"role": "user", "content": text}]) for text in ("甲", "a")]
        same = (n for n, ids in enumerate(zip(prompt, *others, strict=False)) if len(set(ids)) > 1)
        return prompt[: next(same, min(map(len, (prompt, *others))))]


class _Timed:
    """Tokens as they come. n: how many; first, latest: when they came."""

    def __init__(self, tokens: Iterator[int]):
        self.tokens, self.n, self.first, self.latest = tokens, 0, 0.0, 0.0

    def __iter__(self) -> Iterator[int]:
        for token in self.tokens:
            self.latest = time.perf_counter()
            self.first = self.first or self.latest
            self.n += 1
            yield token

    @property
    def speed(self) -> float:
        return (self.n - 1) / (self.latest - self.first) if self.n > 1 else 0.0


@contextmanager
def open_chat(
    gguf: Path,
    *,
    system: str | None = None,
    format: str | None = None,
    n_ctx: int | None = None,
    threads: int = 0,
    max_tokens: int = MAX_TOKENS,
    temperature: float | None = None,
    cached: bool = False,
) -> Iterator[Chat]:
    """Load a GGUF for a conversation.

    format: of the prompt; None = the GGUF's own template. n_ctx: tokens; None = what the model was trained with, within what
    context.py allows. threads: 0 = what `cnq bench` chose, or physical cores. cached: see Chat.
    Raises GgufError, PromptError, EngineError, NoSpace.
    """
    file = GgufFile(gguf)
    style = style_of(file.fields, gguf, format)
    context = choose_context(file, n_ctx)
    sampling = style.sampling if temperature is None else replace(style.sampling, temperature=temperature)
    with Model(gguf, n_ctx=context.n_ctx, n_threads=threads, tuned=best(gguf)) as model:
        chat = Chat(model, style, system, sampling=sampling, max_tokens=max_tokens, cached=cached, format=format)
        chat.notes += context.notes
        yield chat


def converse(chat: Chat, ask: Callable[[], str], show: Callable[[Iterator[str]], object]) -> None:
    """Ask and answer until `ask` raises EOFError; KeyboardInterrupt breaks off an answer, or the line being typed."""
    while True:
        try:
            if text := ask().strip():
                show(chat.ask(text))
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def prompt_tokens(model: Model, style: Style, messages: list[Message]) -> list[int]:
    """The conversation as tokens, with exactly one bos in front if the model wants one, however the template has it."""
    bos, eos = model.token_text("bos"), model.token_text("eos")
    text = prompts.render(style.jinja, messages, bos=bos, eos=eos)
    if bos and model.adds_bos:
        text = text.removeprefix(bos)
    return model.prompt(text, parse_special=True)


def characters(pieces: Iterable[bytes]) -> Iterator[str]:
    """Bytes to text, each character as soon as it is whole; bytes that are none become U+FFFD.

    The beginning of a character at the end, where the limit of tokens cut it, is left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text


def until(stops: tuple[str, ...], pieces: Iterable[str]) -> Iterator[str]:
    """The text before the first of `stops`; what may be the beginning of one is held back until it is clear."""
    held = ""
    for piece in pieces:
        held += piece
        cut = min((at for stop in stops if (at := held.find(stop)) >= 0), default=None)
        if cut is not None:
            if cut:
                yield held[:cut]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held

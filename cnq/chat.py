"""A conversation with a GGUF: its prompt format, streaming that never shows half a character, and where to stop."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from . import prompts
from .engine.model import Model, Sampling
from .errors import PromptError
from .gguf_file import GgufFile
from .prompts import Message
from .tuning import best

MAX_CTX = 4096  # tokens; longer contexts cost memory from the start


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


class Chat:
    """A conversation; `messages` may be changed between answers."""

    def __init__(self, model: Model, style: Style, system: str | None = None):
        self.model = model
        self.style = style
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, max_tokens: int, temperature: float | None = None) -> Iterator[str]:
        """Yield the answer to `text` in pieces of whole characters; both join the conversation, also when it is broken off."""
        self.messages.append({"role": "user", "content": text})
        sampling = self.style.sampling if temperature is None else replace(self.style.sampling, temperature=temperature)
        tokens = self.model.generate(prompt_tokens(self.model, self.style, self.messages), sampling, max_tokens)
        tokens = takewhile(lambda token: token != self.style.end, tokens)
        answer = ""
        try:
            for piece in until(self.style.stop, characters(self.model.piece(t) for t in tokens)):
                piece = piece if answer else piece.lstrip()
                answer += piece
                if piece:
                    yield piece
        finally:
            self.messages.append({"role": "assistant", "content": answer.rstrip()})


@contextmanager
def open_chat(
    gguf: Path, *, system: str | None = None, format: str | None = None, n_ctx: int | None = None, threads: int = 0
) -> Iterator[Chat]:
    """Load a GGUF for a conversation.

    format: of the prompt; None = the GGUF's own template. n_ctx: tokens; None = what the model was trained with, at most
    MAX_CTX. threads: 0 = what `cnq bench` chose, or physical cores. Raises GgufError, PromptError, EngineError.
    """
    file = GgufFile(gguf)
    style = style_of(file.fields, gguf, format)
    trained = file.fields.get(f"{file.arch}.context_length")
    trained = trained if isinstance(trained, int) else MAX_CTX
    with Model(gguf, n_ctx=n_ctx or min(trained, MAX_CTX), n_threads=threads, tuned=best(gguf)) as model:
        yield Chat(model, style, system)


def converse(
    chat: Chat,
    ask: Callable[[], str],
    show: Callable[[Iterator[str]], object],
    max_tokens: int,
    temperature: float | None,
) -> None:
    """Ask and answer until `ask` raises EOFError; KeyboardInterrupt breaks off an answer, or the line being typed."""
    while True:
        try:
            if text := ask().strip():
                show(chat.ask(text, max_tokens, temperature))
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
    return model.tokenize(text, add_special=True, parse_special=True)


def characters(pieces: Iterable[bytes]) -> Iterator[str]:
    """Bytes to text, each character as soon as it is whole; bytes that are none become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
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

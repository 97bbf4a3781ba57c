"""What the page's buttons do with a conversation and the model."""

import asyncio
import html
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from ..chat import Answer, Chat, Style, prompt_tokens
from ..engine.model import Model
from ..errors import CnqError, Interrupted
from ..prompts import Message
from ..slots import Busy, Put, Slots, Stopping
from .texts import displayed
from .words import say

_EVERY = 0.05  # seconds between updates of an answer: the whole conversation is compared and drawn each time


@dataclass(frozen=True)
class Conversation:
    """messages: without the system text. start: how many of them the model sees no more, as the context was full."""

    messages: tuple[Message, ...] = ()
    start: int = 0

    @property
    def asked(self) -> int | None:
        """The place of the last question."""
        return max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=None)

    def plus(self, role: str, content: str) -> "Conversation":
        return replace(self, messages=(*self.messages, {"role": role, "content": content}))

    def whole(self, system: str) -> list[Message]:
        return _after(system, self.messages)


def _after(system: str, messages: tuple[Message, ...]) -> list[Message]:
    return [{"role": "system", "content": system.strip()}, *messages] if system.strip() else list(messages)


class Talk:
    """Each function gives all of the components that change: history, chat, question and the five buttons."""

    def __init__(self, slots: Slots, style: Style):
        self._slots, self._style = slots, style

    def shown(self, history: Conversation, question: str, *, running: bool = False) -> list[Any]:
        buttons = [gr.update(interactive=not running) for _ in range(3)]
        messages = [m | {"content": displayed(m["content"])} for m in history.messages]
        return [history, messages, question, gr.update(visible=not running), gr.update(visible=running), *buttons]

    async def ask(self, question: str, history: Conversation, *given: Any) -> AsyncIterator[list[Any]]:
        if question.strip():
            async for update in self._answer(history.plus("user", question.strip()), "", *given):
                yield update

    async def again(self, question: str, history: Conversation, *given: Any) -> AsyncIterator[list[Any]]:
        """Answer the last question once more. question: what is being typed, which stays."""
        if (at := history.asked) is not None:
            async for update in self._answer(Conversation(history.messages[: at + 1]), question, *given):
                yield update

    def undo(self, question: str, history: Conversation) -> list[Any]:
        """Take the last question back to where it was typed."""
        if (at := history.asked) is None:
            return self.shown(history, question)
        return self.shown(Conversation(history.messages[:at]), question or history.messages[at]["content"])

    def ended(self, question: str, history: Conversation) -> list[Any]:
        """What was said stays; a question to which nothing was said is taken back."""
        if history.messages and history.messages[-1]["role"] == "user":
            return self.undo(question, history)
        return self.shown(history, question)

    async def _answer(
        self,
        history: Conversation,
        question: str,
        language: str,
        system: str,
        temperature: float,
        top_p: float,
        top_k: float,
        min_p: float,
        repeat_penalty: float,
        max_tokens: float,
    ) -> AsyncIterator[list[Any]]:
        """history: ends with what is asked."""
        sampling = replace(self._style.sampling, temperature=temperature, top_p=top_p, top_k=int(top_k), min_p=min_p,
                           repeat_penalty=repeat_penalty)  # fmt: skip

        def work(model: Model, put: Put) -> None:
            model.share_threads(max(1, self._slots.n_running))
            chat = Chat(model, self._style, system.strip() or None, sampling=sampling, max_tokens=int(max_tokens))
            before = len(chat.messages)
            chat.messages += history.messages[:-1]
            chat.start = before + history.start
            for piece in chat.ask(history.messages[-1]["content"]):
                put((chat.start - before, piece))
            put(chat.last)

        yield self.shown(history, question, running=True)
        begun, answer, told = history, "", time.perf_counter()
        try:
            seen = _after(system, history.messages[history.start :])
            prompt = await asyncio.to_thread(prompt_tokens, self._slots.model, self._style, seen)
            turn = self._slots.start(work, prompt)
        except CnqError as error:
            _warn(error, language)
            return
        try:
            async for part in turn:
                match part:
                    case (start, piece):
                        answer += piece
                        if start > begun.start:
                            gone = sum(m["role"] == "user" for m in begun.messages[begun.start : start])
                            gr.Info(say("forgets", language, n=gone), title=say("note", language))
                            begun = replace(begun, start=start)
                    case Answer(ended="context"):
                        gr.Info(say("full", language), title=say("note", language))
                if time.perf_counter() - told >= _EVERY and answer:
                    told = time.perf_counter()
                    yield self.shown(begun.plus("assistant", answer), question, running=True)
        except Interrupted:
            pass  # the server ends
        except CnqError as error:
            _warn(error, language)
        finally:
            turn.close()
        if answer:
            yield self.shown(begun.plus("assistant", answer), question, running=True)


def _warn(error: CnqError, language: str) -> None:
    match error:
        case Busy():
            told = say("busy", language, seconds=error.seconds)
        case Stopping():
            told = say("stopping", language)
        case _:
            told = say("error", language, error=html.escape(str(error)))
    gr.Warning(told, title=say("note", language))

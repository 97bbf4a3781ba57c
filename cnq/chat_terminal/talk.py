"""The chat in a terminal: a question is read, its answer drawn while the model writes it, commands are obeyed."""

import time
from collections.abc import Iterator

from rich.console import Console
from rich.theme import Theme

from ..errors import CnqError
from ..sessions import Session
from . import commands, status
from .arriving import arriving
from .drawing import Drawing, rendered
from .editor import Editor, PlainEditor
from .markdown import Markdown, Prose
from .wrapping import clusters, printable

_TICK = 0.08  # seconds from one drawing to the next, at least
_SHARE = 10  # of the time may be spent on drawing one part in so many: the model needs the cores
_THEME = Theme({"markdown.code": "bold cyan", "markdown.hr": "dim", "markdown.block_quote": "dim"})


def talk(session: Session) -> None:
    """Converse until the user leaves."""
    Talk(session).run()


class Talk:
    def __init__(self, session: Session):
        self.chat, self.session = session.chat, session
        self.console = Console(highlight=False, theme=_THEME)
        self._used = 0
        self._editor = PlainEditor() if self.console.is_dumb_terminal else Editor(self._toolbar)

    def _toolbar(self) -> str:
        return status.line(self._used, self.chat.model.n_ctx, self.chat.last.speed if self.chat.last else 0.0)

    def run(self) -> None:
        self._greet()
        if self._editor.note:
            self.chat.notes.append(self._editor.note)
        while True:
            try:
                self._say(*self._notes(), style="yellow")
                self._used = self.chat.used()
                if self._obey(self._editor.read()):
                    return
            except KeyboardInterrupt:  # at the prompt, or a second one after that which stopped an answer
                self._say("Ctrl-D or /exit leaves.", style="dim")
            except EOFError:
                return
            except CnqError as error:
                self._say(str(error), "", style="red")

    def _obey(self, text: str) -> bool:
        """Do what a line says; True = leave."""
        if commands.is_command(text):
            reply = commands.run(self.chat, text)
            self._say(*([reply.text, ""] if reply.text else []))
            if reply.answer:
                self._answer(reply.answer)
            changed, leave = reply.changed, reply.leave
        elif text.strip():
            self._answer(self.chat.ask(text.strip()))
            changed, leave = True, False
        else:
            changed = leave = False
        if changed:
            self.session.save()
        return leave

    def _greet(self) -> None:
        self._say(f"{self.chat.model.path.name}: /help lists the commands, Ctrl-D leaves.", style="dim")
        if not any(m["role"] == "user" for m in self.chat.messages):
            return
        self._say(f"{self.session.path} goes on; its last question and answer:", style="dim")
        for message in self.chat.messages[-2:]:
            if message["role"] == "user":
                self._say(">>> " + message["content"])
            else:
                print(*rendered(self.console, Markdown(message["content"])), "", sep="\n", file=self.console.file)

    def _answer(self, pieces: Iterator[str]) -> None:
        model = self.chat.model
        try:
            with self._editor.kept_typing() as fetch, arriving(pieces, model.interrupt) as coming:
                plain = self.console.is_dumb_terminal or self.console.legacy_windows
                show = self._write if plain else self._draw
                show(fetch() or piece for piece in coming)
        finally:
            model.resume()

    def _draw(self, coming: Iterator[str]) -> None:
        drawing, text, due = Drawing(self.console), "", 0.0
        began = 0.0  # when the first piece came
        ending: list[str] = []
        try:
            for piece in clusters(coming):
                text += piece
                started = time.perf_counter()
                if text and not began:
                    began = started
                if started < due:
                    continue
                drawing.update(text, self._notes(), self._status(began))
                text = ""
                due = started + max(_TICK, _SHARE * (time.perf_counter() - started))
            ending = self._ending()
        finally:
            drawing.finish(text, [*self._notes(), *ending])

    def _write(self, coming: Iterator[str]) -> None:
        """For a terminal that cannot move its cursor: the text as it comes."""
        for piece in clusters(coming):
            self.console.file.write(printable(piece))
            self.console.file.flush()
        self._say("", *self._notes(), *self._ending())

    def _status(self, began: float) -> str:
        """What goes on, while it does: reading the prompt, or writing since `began`."""
        model, n_prompt = self.chat.model, self.chat.n_prompt
        if not began:
            read = f"reading {min(model.n_seen, n_prompt)} of {n_prompt} tokens" if n_prompt else "reading"
            return f"{read} · Ctrl-C stops"
        elapsed = time.perf_counter() - began
        written = max(0, model.n_seen - n_prompt)
        speed = written / elapsed if elapsed > 1 else 0.0
        return status.line(model.n_seen, model.n_ctx, speed, "Ctrl-C stops")

    def _ending(self) -> list[str]:
        """What should be said of an answer that did not end by itself."""
        last = self.chat.last
        if last is None or (last.ended == "stopped" and not last.n_tokens):
            return ["stopped before the answer; the question is taken back."]
        return {
            "end": [] if last.n_tokens else ["the model answered nothing."],
            "stopped": ["stopped."],
            "length": [f"stopped at max_tokens={self.chat.max_tokens}. Ask to go on, or set more: /params max_tokens=…"],
            "context": [],  # Chat has a note of it
        }[last.ended]

    def _notes(self) -> list[str]:
        waiting = self.chat.notes  # another thread may add to it
        return [waiting.pop(0) for _ in range(len(waiting))]

    def _say(self, *texts: str, style: str = "") -> None:
        for text in texts:
            print(*rendered(self.console, Prose(printable(text), style=style)), sep="\n", file=self.console.file)

"""The page: Gradio's components, and what each of them calls. A browser tab is a conversation of its own."""

import time
from typing import Any

import gradio as gr

from ..chat import Style
from ..engine.model import Sampling
from ..slots import Slots
from .talk import Conversation, Talk
from .texts import as_json, as_markdown
from .words import LANGUAGES, language_of, say

_SAVE = """(text, name) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/plain;charset=utf-8"}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}"""
CSS = "#chat .message { line-height: 1.7; } #language { padding-top: 6px; }"
# The reader's own: Gradio's themes fetch theirs from Google.
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", "sans-serif")
MONO_FONTS = ("ui-monospace", "Consolas", "DejaVu Sans Mono", "Noto Sans Mono CJK SC", "monospace")


def make_page(slots: Slots, style: Style, name: str) -> gr.Blocks:
    """name: of the model, to be shown and to name exported files by."""
    talk = Talk(slots, style)
    with gr.Blocks(title=f"{name} · cnq", analytics_enabled=False, fill_height=True) as page:
        history = gr.State(Conversation())
        language = gr.State("zh")
        exported, file_name = (gr.Textbox(visible="hidden") for _ in range(2))
        with gr.Row(equal_height=True):
            gr.Markdown(f"## {name}")
            switch = gr.Radio([(label, key) for key, label in LANGUAGES.items()], value="zh", show_label=False, container=False,
                              min_width=230, scale=0, elem_id="language")  # fmt: skip
        with gr.Row(scale=1):
            with gr.Column(scale=4):
                chat = gr.Chatbot(
                    show_label=False,
                    height="calc(100vh - 245px)",
                    min_height=240,
                    buttons=["copy"],
                    allow_tags=False,
                    latex_delimiters=[{"left": "$$", "right": "$$", "display": True}],
                    elem_id="chat",
                )
                question = gr.Textbox(show_label=False, lines=1, max_lines=8, autofocus=True, elem_id="question")
                with gr.Row():
                    send = gr.Button(variant="primary", min_width=90, elem_id="send")
                    stop = gr.Button(variant="stop", visible=False, min_width=90, elem_id="stop")
                    again, undo, clear = (gr.Button(min_width=90, elem_id=id) for id in ("again", "undo", "clear"))
            with gr.Column(scale=1, min_width=260):
                system = gr.Textbox(lines=3, max_lines=10, elem_id="system")
                with gr.Accordion(open=True) as sampling:
                    sliders = _sliders(style.sampling, slots.model.n_ctx)
                with gr.Accordion(open=True) as export, gr.Row():
                    save_json, save_markdown = (gr.Button(title, size="sm", min_width=90, elem_id=title.lower())
                                                for title in ("JSON", "Markdown"))  # fmt: skip

        # Asking. What follows an answer also follows one that was stopped: an update on its way could undo it otherwise.
        changing = [history, chat, question, send, stop, again, undo, clear]
        given = [history, language, system, *sliders]
        streaming: Any = {
            "outputs": changing,
            "concurrency_limit": None,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        at_once: Any = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        asking = gr.on([question.submit, send.click], talk.ask, [question, *given], **streaming)
        asking_again = again.click(talk.again, [question, *given], **streaming)
        for event in (asking, asking_again):
            event.then(talk.ended, [question, history], changing, **at_once)
        stop.click(None, cancels=[asking, asking_again], **at_once)
        undo.click(talk.undo, [question, history], changing, **at_once)
        for emptying in (clear.click, chat.clear):
            emptying(lambda question: talk.shown(Conversation(), question), question, changing, **at_once)

        # Exporting: the text goes through the page, no file is made here.
        said = [exported, file_name]
        for button, ending, write in (
            (save_json, "json", lambda messages, language: as_json(name, messages)),
            (save_markdown, "md", lambda messages, language: as_markdown(name, messages, language)),
        ):
            made = lambda history, system, language, ending=ending, write=write: (  # noqa: E731
                write(history.whole(system), language),
                f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.{ending}",
            )
            button.click(made, [history, system, language], said, **at_once).then(None, said, None, js=_SAVE, **at_once)

        # Language
        named = {"send": send, "stop": stop, "again": again, "undo": undo, "clear": clear}
        labelled: dict[str, Any] = dict(
            zip(("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens"), sliders, strict=True)
        )
        labelled |= {"system": system, "sampling": sampling, "export": export}

        def speak(language: str) -> list[Any]:
            return [
                language,
                *(gr.update(value=say(word, language)) for word in named),
                *(gr.update(label=say(word, language)) for word in labelled),
                gr.update(info=say("system_info", language)),
                gr.update(placeholder=say("ask_here", language)),
                gr.update(placeholder=say("empty", language)),
            ]

        spoken = [language, *named.values(), *labelled.values(), system, question, chat]
        switch.change(speak, switch, spoken, **at_once)
        page.load(_first_language, None, switch, **at_once).then(speak, switch, spoken, **at_once)
    return page


def _sliders(sampling: Sampling, n_ctx: int) -> list[gr.Slider]:
    return [
        gr.Slider(0, 2, sampling.temperature, step=0.05, elem_id="temperature"),
        gr.Slider(0, 1, sampling.top_p, step=0.01, elem_id="top_p"),
        gr.Slider(0, 200, sampling.top_k, step=1, elem_id="top_k"),
        gr.Slider(0, 1, sampling.min_p, step=0.01, elem_id="min_p"),
        gr.Slider(0.5, 2, sampling.repeat_penalty, step=0.01, elem_id="repeat_penalty"),
        gr.Slider(1, n_ctx, min(1024, n_ctx), step=1, elem_id="max_tokens"),
    ]


def _first_language(request: gr.Request) -> str:
    return language_of(request.headers.get("accept-language", ""))

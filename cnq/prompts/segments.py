"""Where the answers are in a rendered conversation: what a model learns, apart from what it is only shown."""

import re
from collections.abc import Callable, Sequence

from ..errors import PromptError
from .formats import Format
from .rendering import Message, render

TOKEN = re.compile(r"<[^<>\s]+>")  # what tokens of templates look like
Rendered = Callable[[Sequence[Message], bool], str]  # of messages, and whether the prompt for an answer follows them


def segments(template: Format | str, messages: Sequence[Message], *, bos: str = "", eos: str = "") -> list[tuple[str, bool]]:
    """The conversation as (text, learned) in turn; together the texts are render(…, add_generation_prompt=False).

    template: a format, or a Jinja template. bos, eos: the model's tokens as text.

    Learned is what the model has to write: all that follows the prompt which calls for the answer, through the token that ends
    it, but not the white space that a template puts behind that token. Where the conversation does not go on from the prompt
    that the template renders, the answer begins with its own text. Formats whose authors put no end token between rounds
    (alpaca, alpaca-training, chinese-vicuna, baichuan-2) have one behind the last answer only.

    Tokenize the texts together, not each by itself: a tokenizer may put a space before whatever it is given. A token is
    learned when its first character is.

    Raises PromptError when the template refuses the conversation, or changes answers so that they cannot be found again.
    """
    jinja = template.jinja if isinstance(template, Format) else template

    def rendered(messages: Sequence[Message], prompt: bool) -> str:
        return render(jinja, messages, bos=bos, eos=eos, add_generation_prompt=prompt)

    marks = _marks(messages)
    marked = [{**m, "content": marks.get(i, m["content"])} for i, m in enumerate(messages)]
    around = _around(rendered(marked, False), list(marks.values()))
    contents = _contents(rendered(messages, False), around, [messages[i]["content"] for i in marks])
    split, seen, ended = [], "", 0  # ended: how much of the text before the next answer belongs to the last one
    for n, (i, mark) in enumerate(marks.items()):
        begins = max(ended, _called(rendered, marked[:i], seen, around[n]))
        seen += around[n] + mark
        split.append((around[n][ended:begins], False))
        ended = _ended(rendered, marked[: i + 1], mark, around[n + 1])
        split.append((around[n][begins:] + contents[n] + around[n + 1][:ended], True))
    split.append((around[-1][ended:], False))
    return [part for part in split if part[0]]


def _marks(messages: Sequence[Message]) -> dict[int, str]:
    """Place of each answer -> a text that stands for it, of characters that the conversation has not."""
    fence = "\ue000"
    while any(fence in m["content"] for m in messages):
        fence += "\ue000"
    return {i: f"{fence}{i}\ue001" for i, m in enumerate(messages) if m["role"] == "assistant"}


def _around(text: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and behind the marks."""
    around = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise PromptError(
                "the model's chat template leaves an answer of the conversation out. Choose a format with --format."
            )
        around.append(before)
    return [*around, text]


def _contents(text: str, around: Sequence[str], answers: Sequence[str]) -> list[str]:
    """The answers as they stand in the text: templates may strip them, or drop a part of them."""
    at, found = len(around[0]), []
    sound = text.startswith(around[0])
    for n, (answer, behind) in enumerate(zip(answers, around[1:], strict=True), 1):
        last = n == len(answers)
        likely = (answer, answer.strip(), answer.lstrip(), answer.rstrip())
        content = next((c for c in likely if _follows(text, at, c + behind, last)), None)
        if content is None:
            end = len(text) - len(behind) if last else text.find(behind, at)
            sound &= at <= end and text.startswith(behind, end)
            content = text[at:end]
        found.append(content)
        at += len(content) + len(behind)
    if not sound or at != len(text):
        raise PromptError(
            "the model's chat template changes answers so that they cannot be found. Choose a format with --format."
        )
    return found


def _follows(text: str, at: int, part: str, last: bool) -> bool:
    return text[at:] == part if last else text.startswith(part, at)


def _called(rendered: Rendered, messages: Sequence[Message], seen: str, before: str) -> int:
    """How much of `before`, which stands between `seen` and an answer, is the prompt that calls for the answer."""
    try:
        prompt = rendered(messages, True)
    except PromptError:  # the template wants a question first
        return len(before)
    return len(prompt) - len(seen) if (seen + before).startswith(prompt) and len(prompt) >= len(seen) else len(before)


def _ended(rendered: Rendered, messages: Sequence[Message], mark: str, behind: str) -> int:
    """How much of `behind` ends the answer, which is the last of the messages.

    What ends a text may be less inside of one: then as many whole tokens as both have.
    """
    end = rendered(messages, False).rpartition(mark)[2].rstrip()
    cuts = [len(end), *(token.end() for token in TOKEN.finditer(end))]
    return max((cut for cut in cuts if behind.startswith(end[:cut])), default=0)

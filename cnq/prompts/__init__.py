"""Chat formats: how a conversation becomes the text that a model was trained on, where its answers are, and where they end.

One Jinja template a format serves training, chat, server and the GGUF itself; the Go template beside it says the same to
Ollama.
"""

from .endings import Ending, ending
from .formats import CHATML, FORMATS, Format, named
from .rendering import Message, of_template, render, template_of, token_text
from .segments import segments

__all__ = [
    "CHATML", "FORMATS", "Ending", "Format", "Message", "ending", "named", "of_template", "render", "segments", "template_of",
    "token_text",
]  # fmt: skip

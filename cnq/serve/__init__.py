"""A GGUF as an OpenAI-compatible HTTP server.

llama-cpp-python brings such a server (llama_cpp.server, 0.3.36 was read). Of it, only its JSON schema converter is used here:
it decodes all tokens again at each step of a stream; one lock holds every other request, /v1/models too, until the reader
of a stream has taken the last event; nothing bounds how many wait; it allows every web page (CORS *) and compares the key
with ==; and its prompts are not the ones the rest of cnq proves token by token.
"""

from .server import Serving, serve

__all__ = ["Serving", "serve"]

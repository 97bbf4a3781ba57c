"""A GGUF as an OpenAI-compatible HTTP server.

llama-cpp-python brings such a server (llama_cpp.server; 0.3.36 was run). Only its JSON schema converter and, below, llama.cpp
itself are used here, because: a request cuts off the answer that another is being given (of 300 tokens asked for, 69 came when
/v1/models was asked meanwhile; of four answers at a time, three were empty); with that switched off, one lock keeps everybody
waiting, without a bound or a 429; all tokens are decoded again at each step of a stream; every web page may ask and read
(CORS for any origin, with credentials), which cannot be switched off; the key is compared with ==; and its prompts are not
those that the rest of cnq proves token by token.
"""

from .server import Serving, serve

__all__ = ["Serving", "serve"]

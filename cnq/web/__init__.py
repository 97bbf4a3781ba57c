"""A GGUF as a chat page in the browser."""

from .server import serve_page

__all__ = ["serve_page"]

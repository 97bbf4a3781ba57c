"""A GGUF as a model of Ollama: by a Modelfile, or through its API (.create)."""

from .modelfile import Modelfile, write_modelfile

__all__ = ["Modelfile", "write_modelfile"]

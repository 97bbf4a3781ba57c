"""Errors a user can act on: what was found, what was expected, what to do next.

CnqError                    cli.py prints these as one line and exits 1; anything else is our bug, with a traceback
├── UnknownModel            MODEL is no catalog name, no path and no hub id
├── DownloadError           a hub or a package index could not be reached, or sent the wrong bytes
├── CheckpointError         the model directory is incomplete, damaged or inconsistent
│   └── VocabMismatch       tokenizer and embedding rows disagree (usually a LoRA not merged)
├── UnsupportedArch         config.json names a family, or a variant of one, with no description in cnq/archs/
├── UnsupportedVocab        the tokenizer is of a kind llama.cpp would get wrong
├── GgufError               the file is no GGUF, is cut short, or lacks what is needed
├── QuantizeError           llama.cpp refused the quantization, or died in it
│   └── ImatrixRequired     the type is too small for plain rounding
├── EngineError             llama.cpp could not load or run the model
│   └── Interrupted         somebody asked the model to stop
├── StatisticsError         second moments for compensated rounding are missing, damaged, or another model's
├── SessionError            a saved conversation, or the state beside it, is damaged, no such file, or another model's
├── CorpusError             text for calibration or measuring is missing, too short, or no text
├── OllamaError             Ollama does not answer, refuses a model, or could not read a Modelfile
├── PromptError             no prompt format is known for the model, or a template cannot be rendered
├── OutputExists            the destination is there and --force was not given
└── NoSpace                 the disk or the memory is too small, said before the work starts where that can be known
"""

from collections.abc import Iterable


class CnqError(Exception):
    """A problem whose message tells the user what to do."""


class UnknownModel(CnqError):
    pass


class DownloadError(CnqError):
    pass


class CheckpointError(CnqError):
    pass


class VocabMismatch(CheckpointError):
    pass


class UnsupportedArch(CnqError):
    pass


class UnsupportedVocab(CnqError):
    pass


class GgufError(CnqError):
    pass


class QuantizeError(CnqError):
    pass


class ImatrixRequired(QuantizeError):
    pass


class EngineError(CnqError):
    pass


class Interrupted(EngineError):
    pass


class StatisticsError(CnqError):
    pass


class SessionError(CnqError):
    pass


class CorpusError(CnqError):
    pass


class OllamaError(CnqError):
    pass


class PromptError(CnqError):
    pass


class OutputExists(CnqError):
    pass


class NoSpace(CnqError):
    pass


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names, comma-separated, and how many more there are: for messages."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")

"""The tokenizer of a model in Meta's layout: beside the weights, or in the folder above, where a download puts it."""

from dataclasses import dataclass
from pathlib import Path

from .. import vocab as vocabs
from ..errors import UnsupportedVocab
from ..vocab import Vocab


@dataclass(frozen=True)
class Found:
    """folder: where the files are. vocab: what they say."""

    folder: Path
    vocab: Vocab

    @property
    def is_llama3(self) -> bool:
        return self.vocab.model == "gpt2"

    @property
    def ids(self) -> dict[str, int]:
        """For config.json."""
        return {f"{name}_token_id": self.vocab.special[name] for name in ("bos", "eos") if name in self.vocab.special}

    @property
    def notes(self) -> list[str]:
        if not self.is_llama3 or self.vocab.chat_template is not None:
            return []
        return [
            "whether it is an instruct model is not said: it ends with <|end_of_text|>, for the other give --format llama-3"
        ]


def folder_of(path: Path) -> Path | None:
    """Where the tokenizer of a model directory is, if anywhere."""
    if any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return path
    above = path.absolute().parent
    return above if (above / "tokenizer.model").is_file() else None


def find(path: Path, rows: int, *, scaled_rope: bool) -> Found | None:
    """The tokenizer for an embedding of `rows` rows. Raises UnsupportedVocab, VocabMismatch."""
    folder = folder_of(path)
    if folder is None:
        return None
    vocab = vocabs.load(folder, rows, scaled_rope=scaled_rope)
    vocab.add = {"bos": True, "eos": False} | vocab.add  # Meta's example code encodes every prompt so
    return Found(folder, vocab)


def write(path: Path, found: Found | None, scratch: Path) -> Path:
    """The folder that has the tokenizer as Hugging Face's files. Raises UnsupportedVocab when there is none."""
    if found is None:
        raise UnsupportedVocab(
            f"neither {path} nor the folder above it has tokenizer.model. Take it from the model's own download."
        )
    folder, vocab = found.folder, found.vocab
    complete = vocab.model == "llama" or (folder / "tokenizer.json").is_file()
    if complete and (folder / "tokenizer_config.json").is_file():
        return folder
    model = folder / "tokenizer.model"
    vocabs.write(vocab.fields(), scratch, model if vocab.model == "llama" and model.is_file() else None)
    return scratch

"""SentencePiece models piece by piece: LLaMA's and the Chinese ones read, a longer one made.

Format: https://github.com/google/sentencepiece/blob/v0.2.0/src/sentencepiece_model.proto
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto as Model
from sentencepiece.sentencepiece_model_pb2 import TrainerSpec

from cnq.errors import CheckpointError, UnsupportedVocab, listed
from cnq.vocab.special import read
from cnq.vocab.spm import is_sentencepiece_json
from cnq.vocab.tiktoken import is_ranks
from cnq.vocab.vocab import Kind

SPACE = "▁"
SCORES = ("after", "zero")
_BYTE_LEVEL = (
    "a byte-level vocabulary as LLaMA 3's, which SentencePiece's pieces do not fit, and which needs none: it encodes Chinese "
    "at about 95 % of Chinese-LLaMA-2's efficiency. Name the tokenizer.model of a LLaMA 1 or 2."
)


def read_model(path: Path) -> Model:
    """A SentencePiece file. Raises UnsupportedVocab for anything else, CheckpointError when it cannot be read."""
    model = Model()
    try:
        if is_ranks(path):
            raise UnsupportedVocab(f"{path} holds tiktoken's ranks, {_BYTE_LEVEL}")
        model.ParseFromString(path.read_bytes())
        SentencePieceProcessor(model_proto=model.SerializeToString())  # checks what the format demands beyond protobuf
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Name a SentencePiece file.") from error
    except (DecodeError, RuntimeError):
        model.Clear()
    if not model.pieces:  # nothing at all is a valid protobuf message, too
        raise UnsupportedVocab(
            f"{path} is no SentencePiece file. Name a tokenizer.model, or what SentencePiece's trainer wrote."
        )
    return model


def read_base(path: Path) -> Model:
    """LLaMA's tokenizer.model, or the one in the directory `path`.

    Raises UnsupportedVocab for a model that is not BPE, that normalizes text, or beside which there are added tokens.
    """
    if path.is_dir() and not (path / "tokenizer.model").is_file():
        if (path / "tokenizer.json").is_file():
            if is_sentencepiece_json(read(path / "tokenizer.json")):
                raise UnsupportedVocab(
                    f"{path} lacks the tokenizer.model that its tokenizer.json was made from. Fetch it, too."
                )
            raise UnsupportedVocab(f"{path} has no tokenizer.model, but {_BYTE_LEVEL}")
        holds = listed(sorted(p.name for p in path.iterdir())) or "nothing"
        raise UnsupportedVocab(f"{path} has no tokenizer.model (it holds {holds}). Name LLaMA's tokenizer.model.")
    file = path / "tokenizer.model" if path.is_dir() else path
    model = read_model(file)
    if model.trainer_spec.model_type != TrainerSpec.BPE:
        kind = TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
        raise UnsupportedVocab(
            f"{file} is a {kind} model, expected BPE, which LLaMA's is. Name LLaMA's tokenizer first, then the Chinese ones."
        )
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        raise UnsupportedVocab(
            f"{file} normalizes text ({model.normalizer_spec.name}), which LLaMA's does not and llama.cpp cannot: there, text "
            "would be cut otherwise. Name LLaMA's tokenizer.model."
        )
    if added := _added_tokens(path, len(model.pieces)):
        raise UnsupportedVocab(
            f"{path}: tokens were added beside tokenizer.model ({listed(added)}), from id {len(model.pieces)} on, where the "
            "new pieces go. Start from the tokenizer without them, and give them again with --special-token."
        )
    return model


def _added_tokens(folder: Path, n: int) -> list[str]:
    """Tokens that a Hugging Face directory adds behind the n pieces of its tokenizer.model."""
    try:
        beside = {id: text for text, id in read(folder / "added_tokens.json").items()}
        for id, entry in read(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
            beside[int(id)] = entry["content"]
        return [text for id, text in sorted(beside.items()) if id >= n]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnsupportedVocab(
            f"{folder}: the tokenizer's files are not in order ({type(error).__name__}: {error}). "
            "Take them from the model's own repository, or name its tokenizer.model alone."
        ) from error


def new_pieces(base: Model, sources: Iterable[Model]) -> list[str]:
    """The pieces of text that the sources have and the base lacks, in their order.

    Their control, unknown and byte pieces are the base's business.
    """
    known = {p.piece for p in base.pieces}
    texts = [p.piece for source in sources for p in source.pieces if p.type in (Kind.NORMAL, Kind.USER_DEFINED)]
    return list(dict.fromkeys(text for text in texts if text not in known))


def new_characters(known: Collection[str]) -> list[str]:
    """Every code point from U+4E00 to U+9FFF (the CJK unified ideographs) that is not known yet."""
    return [c for c in map(chr, range(0x4E00, 0xA000)) if c not in known]


def missing_characters(model: Model) -> list[str]:
    """The characters of the pieces that are no pieces themselves, which transformers can therefore not join."""
    known = {p.piece for p in model.pieces}
    return sorted({c for p in model.pieces if p.type == Kind.NORMAL for c in p.piece if c not in known})


def appended(base: Model, texts: Sequence[str], scores: str = "after") -> Model:
    """A copy of the base with a piece for each text behind its own.

    scores: "after" goes on below the lowest score of the base, so that the base's pieces are joined first and no two new
    ones tie; "zero" is the score of the Chinese-LLaMA models: before all of the base, ties to the left.
    """
    model = Model()
    model.CopyFrom(base)
    lowest = lowest_score(base)
    step = max(1.0, float(abs(np.spacing(np.float32(2 * lowest)))))  # scores are float32: a smaller step could be lost
    for i, text in enumerate(texts, 1):
        model.pieces.add(piece=text, score=0.0 if scores == "zero" else lowest - i * step)  # of type NORMAL, unless said
    return model


def lowest_score(model: Model) -> float:
    """Of the pieces of text; runs of spaces are left out: LLaMA's have -1e9, to be joined when all else is done."""
    return min((p.score for p in model.pieces if p.type == Kind.NORMAL and p.piece.strip(SPACE)), default=0.0)

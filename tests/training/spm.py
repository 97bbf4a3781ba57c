"""SentencePiece models made piece by piece: the sort of BPE that LLaMA has, and lists of Chinese pieces."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import tiny
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from cnq.vocab.vocab import Kind

CONTROLS = (("<unk>", Kind.UNKNOWN), ("<s>", Kind.CONTROL), ("</s>", Kind.CONTROL))


def bpe(pieces: Mapping[str, float] | Iterable[str]) -> ModelProto:
    """A BPE model with byte fallback, as LLaMA's; pieces without scores have them in falling order."""
    scores = pieces if isinstance(pieces, Mapping) else {piece: -float(i) for i, piece in enumerate(pieces)}
    model = ModelProto()
    for text, kind in (*CONTROLS, *((f"<0x{b:02X}>", Kind.BYTE) for b in range(256))):
        model.pieces.add(piece=text, score=0.0, type=kind)
    for text, score in scores.items():
        model.pieces.add(piece=text, score=score)
    _specify(model, TrainerSpec.BPE, byte_fallback=True)
    return model


def chinese(pieces: Iterable[str]) -> ModelProto:
    """A unigram model without bytes, as Chinese-LLaMA's; the order is that of the probabilities."""
    model = ModelProto()
    for text, kind in CONTROLS:
        model.pieces.add(piece=text, score=0.0, type=kind)
    for i, text in enumerate(pieces):
        model.pieces.add(piece=text, score=-float(i))
    _specify(model, TrainerSpec.UNIGRAM, byte_fallback=False)
    return model


def _specify(model: ModelProto, kind: int, byte_fallback: bool) -> None:
    model.trainer_spec.model_type = kind
    model.trainer_spec.byte_fallback = byte_fallback
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False


def texts(model: ModelProto) -> list[str]:
    return [p.piece for p in model.pieces]


def encoder(model: ModelProto) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def saved(model: ModelProto, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def llama(folder: Path) -> ModelProto:
    """The tiny tokenizer's model: trained BPE, 420 pieces, also of Chinese."""
    tiny.tokenizer(folder, "spm")
    model = ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    return model

"""SentencePiece vocabularies, which llama.cpp merges by score: tokenizer.model, or a tokenizer.json made from one."""

import json
import re
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as spm_pb2

from ..errors import UnsupportedVocab, listed
from .special import read
from .vocab import Kind, Vocab, added_kind, placeholder

ADDED_SCORE, _PLACEHOLDER_SCORE = -1000.0, -10000.0  # the reference converter's
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def load_model(folder: Path, rows: int) -> Vocab:
    """tokenizer.model with the added tokens beside it, one token for each of the embedding's `rows`.

    Raises UnsupportedVocab for a unigram model, which llama.cpp would split by the rules of BPE.
    """
    path = folder / "tokenizer.model"
    model = spm_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        understood = len(model.pieces) > 0  # nothing at all is a valid protobuf message, too
    except DecodeError:
        understood = False
    if not understood:
        raise UnsupportedVocab(
            f"{path} is no SentencePiece model, nor LLaMA 3's ranks. Download it again, or use the tokenizer.json of the "
            "model's Hugging Face repository."
        )
    if model.trainer_spec.model_type != spm_pb2.TrainerSpec.BPE:
        kind = spm_pb2.TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
        raise UnsupportedVocab(
            f"{path} is a {kind} SentencePiece model; llama.cpp merges by BPE and would split text differently. "
            "Chinese pieces must be merged into LLaMA's own model: python -m training.merge_tokenizer"
        )
    vocab = _blank("llama", rows)
    vocab.n_tokens = len(model.pieces)
    for id, piece in enumerate(model.pieces[:rows]):
        kind = Kind(piece.type)
        # llama.cpp looks for user-defined symbols before spaces become "▁"
        text = piece.piece.replace("▁", " ") if kind == Kind.USER_DEFINED else piece.piece
        vocab.set(id, text, kind, piece.score)
    for text, id in read(folder / "added_tokens.json").items():
        if vocab.has_row(id, rows):
            vocab.set(id, text, Kind.USER_DEFINED, ADDED_SCORE)
    tokenizer_config = read(folder / "tokenizer_config.json")
    for key, entry in tokenizer_config.get("added_tokens_decoder", {}).items():
        if vocab.has_row(int(key), rows):
            vocab.set(int(key), *added_kind(entry["content"], entry), ADDED_SCORE)
    vocab.special = {
        name: id
        for name, id in (
            ("bos", model.trainer_spec.bos_id),
            ("eos", model.trainer_spec.eos_id),
            ("unk", model.trainer_spec.unk_id),
        )
        if id >= 0
    }
    _normalizer_notes(vocab, model.normalizer_spec)
    _space_prefix(vocab, tokenizer_config, model.normalizer_spec.add_dummy_prefix)
    return vocab


def load_json(folder: Path, rows: int) -> Vocab:
    """A tokenizer.json of BPE over SentencePiece text, without its tokenizer.model.

    llama.cpp merges the pair whose result has the highest score, so a token made by merge number r scores -r: the
    merges happen in the same order as in HF's tokenizer.
    """
    tokenizer = read(folder / "tokenizer.json")
    model = tokenizer["model"]
    ids: dict[str, int] = model["vocab"]
    vocab = _blank("llama", rows)
    vocab.notes.append("no tokenizer.model: scores are taken from the order of tokenizer.json's merges")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    unreachable: list[int] = []
    for text, id in ids.items():
        if not vocab.has_row(id, rows):
            continue
        byte = bool(_BYTE.fullmatch(text))
        if len(text) > 1 and text not in ranks and not byte:
            unreachable.append(id)
        vocab.set(id, text, Kind.BYTE if byte else Kind.NORMAL, float(-ranks.get(text, len(ranks))))
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens", [])}
    for id, entry in added.items():
        if vocab.has_row(id, rows):
            vocab.set(id, *added_kind(entry["content"], entry), ADDED_SCORE)
    if never := [vocab.tokens[id] for id in unreachable if id not in added]:
        vocab.notes.append(f"{len(never)} tokens that no merge makes ({listed(never)}): HF never produces them, llama.cpp may")
    unk = model.get("unk_token")
    if unk in ids:
        vocab.special["unk"] = ids[unk]
    _space_prefix(vocab, read(folder / "tokenizer_config.json"), _prepends_space(tokenizer))
    return vocab


def is_sentencepiece_json(tokenizer: dict[str, Any]) -> bool:
    """BPE with byte fallback over text whose spaces are "▁": what HF makes of a SentencePiece BPE model."""
    model = tokenizer.get("model", {})
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def _blank(model: str, rows: int) -> Vocab:
    return Vocab(
        model=model,
        pre="default",
        tokens=[placeholder(id) for id in range(rows)],
        kinds=[Kind.UNUSED] * rows,
        scores=[_PLACEHOLDER_SCORE] * rows,
    )


def _space_prefix(vocab: Vocab, tokenizer_config: dict[str, Any], prefix: bool) -> None:
    """Whether a space is put before the text. llama.cpp does so unless told; tokenizer_config.json's word is passed on."""
    flag = tokenizer_config.get("add_prefix_space")
    if isinstance(flag, bool):
        vocab.add_space_prefix = flag
    elif not prefix:
        vocab.add_space_prefix = False


def _prepends_space(tokenizer: dict[str, Any]) -> bool:
    text = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    return '"Prepend"' in text or re.search(r'"prepend_scheme": "(first|always)"', text) is not None


def _normalizer_notes(vocab: Vocab, spec: Any) -> None:
    if spec.precompiled_charsmap:
        vocab.notes.append(
            f"tokenizer.model normalizes text ({spec.name}), llama.cpp does not: full-width and composed characters "
            "may get other tokens than in training"
        )
    if spec.remove_extra_whitespaces:
        vocab.notes.append("tokenizer.model merges runs of spaces, llama.cpp keeps them")


# Back to files


def write(fields: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.model from a GGUF's metadata: the same pieces, scores and kinds."""
    model = spm_pb2.ModelProto()
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    unk = fields.get("tokenizer.ggml.unknown_token_id", 0)
    for id, (token, score, kind) in enumerate(zip(tokens, fields["tokenizer.ggml.scores"], kinds, strict=True)):
        piece = token.replace(" ", "▁") if kind == Kind.USER_DEFINED else token
        model.pieces.add(piece=piece, score=score, type=Kind.UNKNOWN if id == unk else _piece_kind(kind))
    trainer = model.trainer_spec
    trainer.model_type = spm_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = Kind.BYTE in kinds
    trainer.unk_id = unk
    trainer.unk_piece = tokens[unk]
    for name in ("bos", "eos", "pad"):
        id = fields.get(f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id", -1)
        setattr(trainer, f"{name}_id", id)
        if id >= 0:
            setattr(trainer, f"{name}_piece", tokens[id])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def _piece_kind(kind: int) -> int:
    """SentencePiece has no second UNKNOWN piece."""
    return Kind.CONTROL if kind == Kind.UNKNOWN else kind

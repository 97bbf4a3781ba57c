"""Rows for new tokens: a checkpoint seen with a longer vocabulary, its other tensors untouched."""

import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from rich.filesize import decimal
from sentencepiece import SentencePieceProcessor

from cnq.archs.tensors import To
from cnq.checkpoint import Checkpoint
from cnq.checkpoint.checkpoint import Entry
from cnq.errors import CheckpointError, CnqError, NoSpace, VocabMismatch
from cnq.gguf_file import BF16, F16, F32, Tensor, decode, encoded

from .pieces import SPACE, Model, read_model

RULES = ("mean", "normal")
_STEP = 256  # rows made at once
_STANDARD_DEVIATION = 0.02  # transformers' default initializer_range


def extended(
    base: Checkpoint, old: Model, new: Model, tokenizer: Path, *, rule: str = "mean", seed: int = 0, multiple: int = 1
) -> Checkpoint:
    """The checkpoint with a row for every token of `new` in its embedding and its output head, which stay tied if they are.

    old: the tokenizer of the base, with whose pieces `new` begins. tokenizer: the directory of the new one's files.
    rule: "mean" of the rows of the old tokens that the new token's text is cut into, the "▁" before it left out, in float32,
    rounded once (the rule of chinese-llama-65b); or "normal": N(0, initializer_range), as transformers' resize without
    mean_resizing, a stream of its own for each tensor and seed.
    multiple: rows are filled up to a multiple of this with copies of the unknown token's: a model that falls back to bytes is
    never taught to say it, so its score is among the lowest; zeros would score in the middle of the vocabulary.
    The rows of old tokens keep every bit. A tensor is made when it is read, and is in memory as a whole then.
    Raises VocabMismatch (base and `old` are of different models), CheckpointError (quantized), NoSpace (of memory), CnqError
    (an unfit multiple).
    """
    require_same(base, old)
    rows = _rounded(len(new.pieces), multiple)
    resized = {name for name, to in base.arch.tensors.items() if isinstance(to, To) and to.shape[0] == "V"}
    parts = cut(old, [p.piece for p in new.pieces[len(old.pieces) :]])
    deviation = float(base.config.get("initializer_range") or _STANDARD_DEVIATION)

    def read(name: str) -> Tensor:
        found = base.read(name)
        if name not in resized:
            return found
        made = _means(found, parts) if rule == "mean" else _normals(found, len(parts), deviation, seed)
        data = np.empty((rows, found.data.shape[1]), found.data.dtype)
        at = len(found.data)
        data[:at] = found.data
        for block in made:
            for chunk in encoded(Tensor(name, F32, block.shape, block), found.type):
                data[at : at + len(chunk)] = chunk
                at += len(chunk)
        data[at:] = found.data[old.trainer_spec.unk_id]
        return Tensor(name, found.type, (rows, found.shape[1]), data)

    def files(folder: Path) -> Path:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
        return folder

    config = {**base.config, "vocab_size": rows}
    if new.trainer_spec.pad_id >= len(old.pieces):
        config["pad_token_id"] = new.trainer_spec.pad_id
    entries = {
        name: Entry(entry.type, (rows, *entry.shape[1:])) if name in resized else entry for name, entry in base.entries.items()
    }
    _require_memory(base, 2 * max(entries[name].nbytes for name in resized if name in entries))
    return replace(base, config=config, entries=entries, read=read, tokenizer=files)


def require_same(base: Checkpoint, old: Model) -> None:
    """Raise VocabMismatch unless the checkpoint's tokenizer is the one to be extended, CheckpointError if it is quantized."""
    rows = base.config["vocab_size"]
    if rows != len(old.pieces):
        raise VocabMismatch(
            f"{base.path}: the embedding has {rows} rows, the tokenizer to be extended {len(old.pieces)} pieces. "
            "Name the tokenizer that the model was trained with, or the model of this tokenizer."
        )
    with tempfile.TemporaryDirectory() as scratch:
        own = base.tokenizer(Path(scratch)) / "tokenizer.model"
        if own.is_file() and [p.piece for p in read_model(own).pieces] != [p.piece for p in old.pieces]:
            raise VocabMismatch(f"{base.path} has another tokenizer.model than the one to be extended. Name the model's own.")
    for name, entry in base.entries.items():
        if entry.type not in (F32, F16, BF16):
            raise CheckpointError(f"{base.path}: {name} is {entry.type.name}, quantized. Start from the float checkpoint.")


def _require_memory(base: Checkpoint, need: int) -> None:
    """For the old rows of one tensor, and the old and the new."""
    free = psutil.virtual_memory().available
    if free < need:
        raise NoSpace(f"{decimal(need)} of memory needed to extend {base.path}, {decimal(free)} free. Close other programs.")


def _rounded(tokens: int, multiple: int) -> int:
    """Rows for so many tokens. Raises CnqError where `cnq convert` would take the spare ones for another model's."""
    rows = -(-tokens // multiple) * multiple
    if rows != tokens and (rows % 8 or rows - tokens > rows // 20):
        raise CnqError(
            f"{tokens} tokens in multiples of {multiple} are {rows} rows. Expected a multiple of 8 (64 suits tensor cores, 256 "
            "the first K-quants), and at most one row in twenty to spare."
        )
    return rows


def cut(old: Model, texts: Sequence[str]) -> list[list[int]]:
    """The old tokens that each text is cut into, without the "▁" in front if there are others."""
    encoder = SentencePieceProcessor(model_proto=old.SerializeToString())
    prefixed = old.normalizer_spec.add_dummy_prefix
    plain = [(text.removeprefix(SPACE) if prefixed else text).replace(SPACE, " ") for text in texts]
    space = encoder.piece_to_id(SPACE)
    unknown = [old.trainer_spec.unk_id]
    return [(ids[1:] if ids[:1] == [space] else ids) or ids or unknown for ids in encoder.encode(plain)]


def _means(table: Tensor, parts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """For each list of rows their mean, a few at a time: (n, D) float32."""
    for start in range(0, len(parts), _STEP):
        rows = [decode(table.data[list(ids)], table.type, table.name).mean(axis=0) for ids in parts[start : start + _STEP]]
        yield np.stack(rows)


def _normals(table: Tensor, n: int, deviation: float, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng([seed, zlib.crc32(table.name.encode())])
    for start in range(0, n, _STEP):
        yield random.standard_normal((min(_STEP, n - start), table.shape[1]), np.float32) * np.float32(deviation)

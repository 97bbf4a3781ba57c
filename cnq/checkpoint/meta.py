"""Meta's layout: consolidated.NN.pth, one for each tensor-parallel rank, with params.json, and tokenizer.model there or one up.

Names, row order and the cuts between ranks: Meta's model.py of LLaMA 1 to 3, and transformers' convert_llama_weights_to_hf.py.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..archs.arch import DROPPED
from ..archs.llama import LLAMA
from ..errors import CheckpointError, listed
from ..gguf_file import Tensor
from . import meta_tokenizer
from .checkpoint import Checkpoint, Entry, Weights
from .hf import read_origin
from .meta_params import Shape, config_of, read_params
from .torch_file import read_torch

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"

# Meta's name, {} = layer -> Hugging Face's name, and the dimension that the ranks share out; None = each has it whole.
_LAYOUT: dict[str, tuple[str, int | None]] = {
    EMBEDDING: ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    HEAD: ("lm_head.weight", 0),
    "layers.{}.attention.wq.weight": ("model.layers.{}.self_attn.q_proj.weight", 0),
    "layers.{}.attention.wk.weight": ("model.layers.{}.self_attn.k_proj.weight", 0),
    "layers.{}.attention.wv.weight": ("model.layers.{}.self_attn.v_proj.weight", 0),
    "layers.{}.attention.wo.weight": ("model.layers.{}.self_attn.o_proj.weight", 1),
    "layers.{}.feed_forward.w1.weight": ("model.layers.{}.mlp.gate_proj.weight", 0),
    "layers.{}.feed_forward.w2.weight": ("model.layers.{}.mlp.down_proj.weight", 1),
    "layers.{}.feed_forward.w3.weight": ("model.layers.{}.mlp.up_proj.weight", 0),
    "layers.{}.attention_norm.weight": ("model.layers.{}.input_layernorm.weight", None),
    "layers.{}.ffn_norm.weight": ("model.layers.{}.post_attention_layernorm.weight", None),
}
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_MIXED = "The shards are damaged or of different models: get all from one place."
_UNLIKE = 0.1  # difference between norms of one model's ranks, as a share of the largest value, that no rounding explains

Shards = dict[str, Weights]  # file name -> its tensors, by rank
_Whole = tuple[Entry, Callable[[], np.ndarray]]


def layout(n_layers: int) -> dict[str, tuple[str, int | None]]:
    """Meta's name of every tensor -> Hugging Face's, and the dimension that the ranks share out; None = each has it whole.

    The embedding's dimension is that of LLaMA 1 and 2; since LLaMA 3 it is 0.
    """
    return {
        name.format(layer): (hf.format(layer), cut)
        for layer in range(-1, n_layers)
        for name, (hf, cut) in _LAYOUT.items()
        if ("{}" in name) == (layer >= 0)
    }


def shard_name(rank: int) -> str:
    return f"consolidated.{rank:02}.pth"


def is_meta(path: Path) -> bool:
    return any(_SHARD.fullmatch(p.name) for p in path.iterdir())


def open_meta(path: Path) -> Checkpoint:
    """Open a directory in Meta's layout as a checkpoint under Hugging Face's names and in its row order.

    Every file is looked at; of the tensors only the norms are read, and what it takes to tell a tied output.
    Raises CheckpointError (a file is missing, cut short or of another model), UnsupportedVocab, VocabMismatch.
    """
    params = read_params(path)
    shards = _shards(path)
    places = layout(params["n_layers"])
    _require_names(path, places, shards)
    wholes = {name: _whole(path, name, places[name][1], shards, params["dim"]) for name in next(iter(shards.values()))}
    shapes = {name: entry.shape for name, (entry, _) in wholes.items()}
    notes = _norm_notes(path, shards, [name for name, (_, cut) in places.items() if cut is None])
    tied = HEAD not in wholes or _is_tied(wholes, shards)
    if tied and HEAD in wholes:
        del wholes[HEAD]
        notes.append("output.weight left out: it is the embedding again")
    tokens = meta_tokenizer.find(path, shapes[EMBEDDING][0], scaled_rope=bool(params.get("use_scaled_rope")))
    config, more_notes = config_of(path, params, shapes, llama3=tokens is not None and tokens.is_llama3, tied=tied)
    if tokens:
        config |= tokens.ids
        more_notes += tokens.notes
    links = {link.hf: link for link in LLAMA.links(config)}
    found = {places[name][0]: (name, *whole) for name, whole in wholes.items()}
    for hf, (name, entry, _) in found.items():
        if entry.shape != links[hf].shape:
            raise CheckpointError(
                f"{path}: {name} is {entry.shape} in all, by params.json it should be {links[hf].shape}. "
                "Weights and params.json are of different models: get both from one place."
            )

    def read(hf: str) -> Tensor:
        _, entry, data = found[hf]
        return Tensor(hf, entry.type, entry.shape, links[hf].back(data()))

    return Checkpoint(
        path=path,
        arch=LLAMA,
        config=config,
        entries={hf: entry for hf, (_, entry, _) in found.items()},
        read=read,
        tokenizer=lambda scratch: meta_tokenizer.write(path, tokens, scratch),
        notes=(*notes, *more_notes),
        origin=read_origin(path),
    )


def _shards(path: Path) -> Shards:
    """All ranks' files. How many there are to be is told by the columns of wo, which share out those of a norm."""
    files = sorted(p for p in path.iterdir() if _SHARD.fullmatch(p.name))
    shards = {f.name: {name: w for name, w in read_torch(f).items() if not name.endswith(DROPPED)} for f in files}
    n = max(map(_ranks, shards.values()))
    wanted = [shard_name(rank) for rank in range(max(n, int(files[-1].name.split(".")[1]) + 1))]
    if missing := [name for name in wanted if name not in shards]:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(wanted)} shards are missing: {listed(missing)}. Finish the download."
        )
    if len(wanted) > n:
        raise CheckpointError(f"{path} has {len(wanted)} shards, each of which is one of {n}. {_MIXED}")
    return shards


def _ranks(weights: Weights) -> int:
    """Among how many ranks a file's model is shared out; 1 when it does not look like a model."""
    whole, piece = (
        weights[name][0].shape[-1:] if name in weights else () for name in ("norm.weight", "layers.0.attention.wo.weight")
    )
    return max(1, whole[0] // piece[0]) if whole and piece and piece[0] else 1


def _require_names(path: Path, places: dict[str, tuple[str, int | None]], shards: Shards) -> None:
    """A tied model may come without output, then in every shard."""
    tied = not any(HEAD in weights for weights in shards.values())
    for file, weights in shards.items():
        if missing := [name for name in places if name not in weights and not (tied and name == HEAD)]:
            raise CheckpointError(
                f"{path / file}: {len(missing)} of {len(places)} tensors are missing: {listed(missing)}. "
                "The download is incomplete, or params.json is of another model."
            )
        if unknown := [name for name in weights if name not in places]:
            raise CheckpointError(
                f"{path / file}: tensors that LLaMA, by params.json, does not have: {listed(unknown)}. "
                "The model is a variant that cnq does not know, or params.json is of another model."
            )


def _whole(path: Path, name: str, cut: int | None, shards: Shards, dim: int) -> _Whole:
    """What the pieces of a tensor make: its type and shape, and what reads it, in Meta's row order."""
    pieces = [weights[name] for weights in shards.values()]
    entries = [entry for entry, _ in pieces]
    if name == EMBEDDING and entries[0].shape[1:] == (dim,):
        cut = 0
    shape = _shape(entries, cut, uneven=cut == 0 and name in (EMBEDDING, HEAD))
    if shape is None or len({entry.type for entry in entries}) > 1:
        found = listed((f"{entry.type.name} {entry.shape} in {file}" for file, entry in zip(shards, entries, strict=True)), 8)
        raise CheckpointError(f"{path}: {name} is {found}, which make no whole. {_MIXED}")

    def read() -> np.ndarray:
        parts = [read().data for _, read in (pieces[:1] if cut is None else pieces)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=cut)

    return Entry(entries[0].type, shape), read


def _shape(pieces: list[Entry], cut: int | None, uneven: bool) -> Shape | None:
    """The shape that pieces make along `cut`; None when they do not fit.

    uneven: the last may be larger, with the rows that were left over when a vocabulary was shared out.
    """
    shapes = [p.shape for p in pieces]
    if any(len(s) != (1 if cut is None else 2) or not all(s) for s in shapes):
        return None
    if cut is None:
        return shapes[0] if len(set(shapes)) == 1 else None
    sizes = [s[cut] for s in shapes]
    if len({s[1 - cut] for s in shapes}) > 1 or len(set(sizes[:-1])) > 1:
        return None
    if sizes[-1] != sizes[0] and not (uneven and sizes[-1] > sizes[0]):
        return None
    return (sum(sizes), shapes[0][1]) if cut == 0 else (shapes[0][0], sum(sizes))


def _is_tied(wholes: dict[str, _Whole], shards: Shards) -> bool:
    """Whether output is the embedding, byte for byte. One row, as far as the first rank has it, mostly answers that."""
    rank = next(iter(shards.values()))
    one, other = (rank[name][1]().data[0].tobytes() for name in (EMBEDDING, HEAD))
    if wholes[EMBEDDING][0] != wholes[HEAD][0] or not other.startswith(one):
        return False
    a, b = (wholes[name][1]().view(np.uint8) for name in (EMBEDDING, HEAD))
    return all(np.array_equal(a[i : i + 1024], b[i : i + 1024]) for i in range(0, len(a), 1024))


def _norm_notes(path: Path, shards: Shards, names: list[str]) -> list[str]:
    """Raise CheckpointError when the ranks' norms, which each has whole, are another model's; note small differences."""
    (first_file, first), *others = shards.items()
    differing: list[str] = []
    for name in names:
        ours = first[name][1]().float32()
        for file, weights in others:
            theirs = weights[name][1]().float32()
            if np.array_equal(ours, theirs):
                continue
            differing.append(f"{name} in {file}")
            if not np.abs(ours - theirs).max() <= _UNLIKE * np.abs(ours).max():
                raise CheckpointError(f"{path}: {name} is not the same in {first_file} and {file}. {_MIXED}")
    return [f"norms differ a little from those of {first_file}, which are taken: {listed(differing)}"] if differing else []

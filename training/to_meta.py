"""A LLaMA checkpoint → Meta's layout: consolidated.NN.pth for tensor-parallel ranks, params.json, tokenizer.model."""

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cnq import terminal, vocab
from cnq.archs.arch import Config, head_dim
from cnq.archs.hparams import rope
from cnq.checkpoint import Checkpoint, open_checkpoint
from cnq.checkpoint.checkpoint import Entry, write_origin
from cnq.checkpoint.hf import copy_tokenizer
from cnq.checkpoint.meta import EMBEDDING, HEAD, layout, shard_name
from cnq.checkpoint.meta_params import LLAMA3_FACTORS, LLAMA3_SCALING, Params, config_of, feed_forward
from cnq.errors import CheckpointError, UnsupportedArch, listed
from cnq.files import replacing, require_replaceable
from cnq.gguf_file import BF16, F16, F32, Tensor, encoded
from cnq.options import FILE, FORCE, JSON, Command
from cnq.vocab import Vocab, tiktoken

from .pth_file import writing

SHARDS = (1, 2, 4, 8)
_METAS_OWN = {5120: 2, 6656: 4, 8192: 8}  # hidden size of LLaMA 13B, 33B, 65B and 70B -> shards; 1 for the others
_MULTIPLES = (4096, 1024, 256, 2048, 512, 128, 64, 32, 16, 8, 4, 2, 1)  # Meta's own first
_FILES_ROOM = 64 << 20  # bytes: tokenizer, params.json, the records of the .pth themselves

_Plan = dict[str, tuple[str, int | None]]  # Meta's name -> name in the checkpoint, dimension that the ranks share out


@dataclass(frozen=True)
class WrittenMeta:
    """nbytes: of all tensors, the norms once for every shard. notes: what the layout cannot say, and what its readers meet."""

    path: Path
    shards: int
    n_tensors: int
    nbytes: int
    notes: tuple[str, ...]
    seconds: float


def write_meta(
    checkpoint: Checkpoint,
    dst: Path,
    *,
    shards: int = 0,
    force: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> WrittenMeta:
    """Write a checkpoint of the LLaMA family as the directory `dst` in Meta's layout, one tensor in memory at a time.

    Every tensor keeps its type, bit for bit; rows of q and k go to Meta's order. A tied output is written out.
    shards: 1, 2, 4 or 8 ranks; 0 = as many as Meta has for the hidden size. progress: bytes written, bytes in all.
    Raises UnsupportedArch (what the layout has no place for), CheckpointError (sizes that cannot be shared out, quantized
    tensors), UnsupportedVocab, VocabMismatch, GgufError (a value that is not finite), OutputExists, NoSpace.
    """
    started = time.perf_counter()
    config = checkpoint.config
    shards = shards or _METAS_OWN.get(config["hidden_size"], 1)
    _require_expressible(checkpoint)
    _require_divisible(checkpoint, shards)
    with tempfile.TemporaryDirectory() as scratch:
        tokens = checkpoint.tokenizer(Path(scratch))
        vocabulary = vocab.load(tokens, config["vocab_size"])
        llama3 = vocabulary.model == "gpt2"
        plan = _plan(checkpoint, llama3)
        params = _params(config, llama3)
        ranks = [
            {name: _share(checkpoint.entries[hf], cut, r, shards) for name, (hf, cut) in plan.items()} for r in range(shards)
        ]
        total = sum(entry.nbytes for entries in ranks for entry in entries.values())
        done = 0

        def wrote(n: int) -> None:
            nonlocal done
            done += n
            progress(done, total)

        with replacing(dst, force=force, need=total + _FILES_ROOM, folder=True) as folder:
            require_replaceable(dst, checkpoint.path, "params.json")
            folder.mkdir()
            (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
            notes = _write_tokenizer(tokens, vocabulary, folder)
            _write_shards(checkpoint, plan, ranks, folder, wrote)
            write_origin(checkpoint, folder)
    shapes = {name: checkpoint.entries[hf].shape for name, (hf, _) in plan.items()}
    understood, _ = config_of(dst, params, shapes, llama3=llama3, tied=bool(config.get("tie_word_embeddings")))
    return WrittenMeta(
        path=dst,
        shards=shards,
        n_tensors=len(plan),
        nbytes=total,
        notes=(*checkpoint.notes, *_notes(config, understood, shards), *notes),
        seconds=time.perf_counter() - started,
    )


def _require_expressible(checkpoint: Checkpoint) -> None:
    """Raise for a model that Meta's layout cannot say, or that is not complete."""
    config, where = checkpoint.config, f"{checkpoint.path} cannot go into Meta's layout"
    if checkpoint.arch.model_type != "llama":
        raise UnsupportedArch(
            f"{where}: it is of {checkpoint.arch.classes[0]}, the layout holds LLaMA. Write a Hugging Face directory instead."
        )
    for flag in ("attention_bias", "mlp_bias"):
        if config.get(flag):
            raise UnsupportedArch(f"{where}, which has no biases ({flag} is set). Write a Hugging Face directory instead.")
    heads, size = config["num_attention_heads"], head_dim(config)
    if heads * size != config["hidden_size"]:
        raise UnsupportedArch(
            f"{where}: head_dim is {size}, and {heads} heads do not make hidden_size {config['hidden_size']}. "
            "Write a Hugging Face directory instead."
        )
    settings = rope(config)
    scaling = LLAMA3_SCALING | {"factor": LLAMA3_FACTORS[bool(config.get("tie_word_embeddings"))]}
    if settings["rope_type"] != "default" and any(settings.get(key) != value for key, value in scaling.items()):
        raise UnsupportedArch(
            f"{where}: rope_scaling is {config.get('rope_scaling') or settings}, params.json can say {scaling} only. "
            "Write a Hugging Face directory instead."
        )
    checkpoint.placed()
    if odd := {entry.type.name for entry in checkpoint.entries.values() if entry.type not in (F32, F16, BF16)}:
        raise CheckpointError(f"{checkpoint.path} is quantized ({listed(sorted(odd))}). Make floats of it first: cnq to-hf")


def _require_divisible(checkpoint: Checkpoint, shards: int) -> None:
    config = checkpoint.config
    sizes = {key: config.get(key) or config["num_attention_heads"] for key in ("num_attention_heads", "num_key_value_heads")}
    sizes |= {key: config[key] for key in ("hidden_size", "intermediate_size")}
    fitting = [n for n in SHARDS if not any(size % n for size in sizes.values())]
    if shards not in fitting:
        said = listed(f"{key} {size}" for key, size in sizes.items())
        raise CheckpointError(
            f"{checkpoint.path} cannot be shared out among {shards} ranks ({said}). "
            f"Give --shards {' or '.join(map(str, fitting))}."
        )


def _plan(checkpoint: Checkpoint, llama3: bool) -> _Plan:
    """llama3: ranks share out the embedding by rows (Meta's llama3/model.py, VocabParallelEmbedding), not by columns."""
    plan = layout(checkpoint.config["num_hidden_layers"])
    embedding, _ = plan[EMBEDDING]
    head, cut = plan[HEAD]
    plan[EMBEDDING] = embedding, 0 if llama3 else 1
    plan[HEAD] = head if head in checkpoint.entries else embedding, cut
    return plan


def _params(config: Config, llama3: bool) -> Params:
    settings, heads = rope(config), config["num_attention_heads"]
    multiple_of, multiplier = feed_forward_rule(config["hidden_size"], config["intermediate_size"])
    params = {
        "dim": config["hidden_size"],
        "multiple_of": multiple_of,
        "n_heads": heads,
        "n_layers": config["num_hidden_layers"],
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if (kv_heads := config.get("num_key_value_heads") or heads) != heads:
        params["n_kv_heads"] = kv_heads
    params |= {"norm_eps": config["rms_norm_eps"], "vocab_size": config["vocab_size"]}
    if llama3 or settings["rope_theta"] != 10000:  # LLaMA 1's and 2's readers do not know the key
        params["rope_theta"] = settings["rope_theta"]
    if settings["rope_type"] == "llama3":
        params["use_scaled_rope"] = True
    return params


def feed_forward_rule(dim: int, size: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that make a feed-forward layer of `size`; no multiplier if it goes without one.

    LLaMA's own numbers first; else the multiplier of the fewest decimals.
    """
    plain = next((m for m in (256, *_MULTIPLES) if feed_forward(dim, m, None) == size), None)
    if plain:
        return plain, None
    hidden = feed_forward(dim, 1, None)
    for digits in range(18):  # with all of a float's digits, a multiple of 1 always does
        for multiple_of in _MULTIPLES:
            middle = round((size - multiple_of / 2 + 1) / hidden, digits)  # of those that are rounded up to size
            for multiplier in (1.3, middle):
                if feed_forward(dim, multiple_of, multiplier) == size:
                    return multiple_of, multiplier
    raise AssertionError((dim, size))


def _bounds(size: int, rank: int, shards: int) -> tuple[int, int]:
    """Where a rank's share begins and ends; what is left over goes to the last."""
    each = size // shards
    return rank * each, size if rank == shards - 1 else (rank + 1) * each


def _share(whole: Entry, cut: int | None, rank: int, shards: int) -> Entry:
    shape = list(whole.shape)
    if cut is not None:
        start, end = _bounds(shape[cut], rank, shards)
        shape[cut] = end - start
    return Entry(whole.type, tuple(shape))


def _write_shards(
    checkpoint: Checkpoint, plan: _Plan, ranks: list[dict[str, Entry]], folder: Path, wrote: Callable[[int], object]
) -> None:
    """Every tensor is read once, and goes to all ranks."""
    links = {link.hf: link for link in checkpoint.arch.links(checkpoint.config)}
    with ExitStack() as stack:
        files = [stack.enter_context(writing(folder / shard_name(rank), entries)) for rank, entries in enumerate(ranks)]
        for name, (hf, cut) in plan.items():
            whole = checkpoint.read(hf)
            data = links[hf].forward(whole.data)
            for rank, (file, entries) in enumerate(zip(files, ranks, strict=True)):
                part = data
                if cut is not None:
                    start, end = _bounds(whole.shape[cut], rank, len(ranks))
                    wide = data.shape[1] // whole.shape[1] if cut else 1  # 2 where a number is stored as two bytes
                    part = data[:, start * wide : end * wide] if cut else data[start:end]
                entry = entries[name]
                file.add(name, encoded(Tensor(name, entry.type, entry.shape, part), entry.type), wrote)


def _write_tokenizer(tokens: Path, vocabulary: Vocab, folder: Path) -> list[str]:
    """The tokenizer's files as they are, with LLaMA 3's tokenizer.model where tokenizer.json is equal to one; and notes."""
    copy_tokenizer(tokens, folder)
    if (folder / "tokenizer.model").is_file():
        return []
    if (ranks := tiktoken.dump(vocabulary)) is None:
        return [
            "the tokenizer is not LLaMA 3's: there is no tokenizer.model, only tokenizer.json, which Meta's code does not read"
        ]
    (folder / "tokenizer.model").write_bytes(ranks)
    return []


def _notes(config: Config, understood: Config, shards: int) -> list[str]:
    notes = []
    ours, theirs = (c.get("max_position_embeddings") for c in (config, understood))
    if ours != theirs:
        notes.append(
            f"params.json has no place for max_position_embeddings, {ours}: cnq will take the model for one of {theirs}"
        )
    if rest := config["vocab_size"] % shards:
        notes.append(
            f"the last shard has {rest} more rows of the vocabulary than the others, which Meta's own code does not load"
        )
    if config.get("tie_word_embeddings"):
        notes.append("output.weight, tied to the embedding, is written out")
    return notes


@click.command(cls=Command)
@click.argument("src", type=FILE)
@click.argument("dst", type=FILE)
@click.option("--shards", type=click.Choice(["0", *map(str, SHARDS)]), default="0", show_default=True,
              help="Tensor-parallel ranks; 0 = as many as Meta has for the model's size.")  # fmt: skip
@FORCE
@JSON
def main(src: Path, as_json: bool, shards: str, **options: Any) -> None:
    """Write the LLaMA checkpoint SRC in Meta's layout: a directory DST of consolidated.*.pth, params.json, tokenizer.model.

    \b
    python -m training.to_meta chinese-alpaca-13b-hf/ zh-models/13B
    """
    with terminal.Progress(quiet=as_json).bar("writing", "bytes") as progress:
        result = write_meta(open_checkpoint(src), shards=int(shards), progress=progress, **options)
    terminal.emit(result, as_json, lambda r: click.echo(
        f"{r.path}/: {r.shards} shards, {r.n_tensors} tensors, {terminal.size(r.nbytes)} in {r.seconds:.1f} s"
    ))  # fmt: skip


if __name__ == "__main__":
    main(prog_name="python -m training.to_meta")

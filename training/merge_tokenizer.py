"""LLaMA's tokenizer + Chinese ones → a merged tokenizer, and a model with rows for its new tokens.

python -m training.merge_tokenizer llama/tokenizer.model chinese_sp.model merged/
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cnq.checkpoint import open_checkpoint
from cnq.corpus import peoples_daily, read_source
from cnq.errors import OutputExists, listed
from cnq.files import byte_size, replacing, require_replaceable
from cnq.options import FILE, FORCE, JSON, Command
from cnq.terminal import Progress, emit, one_line, table
from cnq.to_hf import write_hf

from .chinese_sp import ALGORITHMS, as_text, train
from .efficiency import Efficiency, efficiency, english
from .embeddings import RULES, extended, require_same
from .hf_tokenizer import FILES, cut_otherwise, write
from .pieces import SCORES, Model, read_base, read_model
from .vocabulary import UNREACHABLE, Account, merge

TRAINED = "chinese_sp.model"


@dataclass(frozen=True)
class Merged:
    """What was made.

    tokens: the base's, new, added and special ones. rows: of the embedding, when a model was extended.
    lines: of the text; cut_otherwise: those that transformers cuts otherwise than SentencePiece and llama.cpp.
    """

    path: Path
    tokens: int
    base: int
    special: int
    pieces: Account
    rows: int | None
    efficiency: tuple[Efficiency, ...]
    lines: int
    cut_otherwise: int
    notes: tuple[str, ...]
    seconds: float


def merge_tokenizer(
    llama: Path,
    chinese: Sequence[Path],
    out: Path,
    *,
    train_from: Sequence[Path] = (),
    vocab_size: int = 20000,
    algorithm: str = "bpe",
    characters: bool = False,
    scores: str = "after",
    unreachable: str = "keep",
    special_tokens: Sequence[str] = (),
    pad_token: str | None = None,
    texts: Sequence[Path] = (),
    model: Path | None = None,
    new_rows: str = "mean",
    seed: int = 0,
    pad_to_multiple_of: int = 1,
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Merged:
    """Write the merged tokenizer of `llama` and `chinese` to the directory `out`; with a `model`, its extended checkpoint, too.

    train_from, vocab_size, algorithm: a SentencePiece model trained on these texts comes after those of `chinese`, and is kept
    as chinese_sp.model. characters, scores, unreachable, special_tokens, pad_token: see vocabulary.merge.
    texts: what bytes per token are counted on; none = the People's Daily and Python's reference.
    new_rows, seed, pad_to_multiple_of: see embeddings.extended. max_shard_bytes, progress: see cnq.to_hf.write_hf.
    Raises UnsupportedVocab, VocabMismatch, CheckpointError, CorpusError, OutputExists, NoSpace, CnqError (nothing is new).
    """
    started = time.perf_counter()
    if out.exists() and not force:  # said before the minutes of training
        raise OutputExists(f"{out} exists. Add --force to replace it, or name another output.")
    base = read_base(llama)
    checkpoint = open_checkpoint(model) if model else None
    if checkpoint:
        require_same(checkpoint, base)
    parts = [read_model(path) for path in chinese]
    sources = [read_source(path, as_text) for path in texts] or [peoples_daily("held-out"), english()]
    trained = train([read_source(path, as_text) for path in train_from], vocab_size, algorithm) if train_from else None
    merged, pieces = merge(
        base,
        [*parts, *([trained] if trained else [])],
        characters=characters,
        scores=scores,
        unreachable=unreachable,
        controls=special_tokens,
        pad=pad_token,
    )
    counted = efficiency(sources, base, merged)
    lines = [line for source in sources for document in source.documents for line in document.splitlines()]
    otherwise = cut_otherwise(merged, lines)
    notes = _notes(pieces, [*zip(chinese, parts, strict=True)], otherwise, len(lines))
    rows = None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tokenizer"
        folder.mkdir()
        write(merged, folder, next((p for p in (llama, model) if p and p.is_dir()), None))
        if trained:
            (folder / TRAINED).write_bytes(trained.SerializeToString(deterministic=True))
        if checkpoint:
            grown = extended(checkpoint, base, merged, folder, rule=new_rows, seed=seed, multiple=pad_to_multiple_of)
            rows = grown.config["vocab_size"]
            notes += write_hf(grown, out, max_shard_bytes=max_shard_bytes, force=force, progress=progress).notes
        else:
            _write_tokenizer(folder, out, llama, force)
    return Merged(
        path=out,
        tokens=len(merged.pieces),
        base=len(base.pieces),
        special=len(special_tokens) + bool(pad_token),
        pieces=pieces,
        rows=rows,
        efficiency=tuple(counted),
        lines=len(lines),
        cut_otherwise=otherwise,
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )


def _write_tokenizer(folder: Path, out: Path, llama: Path, force: bool) -> None:
    with replacing(out, force=force, folder=True) as partial:
        require_replaceable(out, llama, "tokenizer.json")
        if out.is_dir() and (others := {p.name for p in out.iterdir()} - {*FILES, TRAINED}):
            raise OutputExists(f"{out} has more in it than a tokenizer ({listed(sorted(others))}). Name another output.")
        shutil.copytree(folder, partial)


def _notes(found: Account, sources: Sequence[tuple[Path, Model]], otherwise: int, lines: int) -> list[str]:
    notes = []
    if n := len(found.unproduced):
        notes.append(
            f"{n} of the new pieces are never produced ({listed(found.unproduced)}), {found.without_split} of them for want of "
            "pieces in between. For a new model, --unreachable add appends those; --unreachable drop saves the rows, and cuts "
            "every text the same"
        )
    if n := len(found.lost):
        notes.append(
            f"{n} pieces of the first tokenizer are no longer produced ({listed(found.lost)}): new ones take their characters "
            "before. With --scores after all of them stay"
        )
    if otherwise:
        notes.append(
            f"transformers cuts {otherwise} of {lines} lines otherwise than SentencePiece and llama.cpp: it cannot join the "
            "leftmost of equal scores (--scores after has no equals), nor a character that is no piece (--unreachable add "
            "makes it one)"
        )
    for path, model in sources:
        if model.normalizer_spec.precompiled_charsmap:
            notes.append(
                f"{path.name} was trained on normalized text ({model.normalizer_spec.name}), the merged tokenizer normalizes "
                "nothing: characters that this replaces, full-width digits and commas among them, are in none of its pieces"
            )
    return notes


_OPTIONS_OF = {
    "model": ("new_rows", "seed", "pad_to_multiple_of", "max_shard_size"),
    "train_from": ("vocab_size", "algorithm"),
}


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("llama", metavar="LLAMA_TOKENIZER", type=FILE)
@click.argument("chinese", metavar="[CHINESE_SPM]...", nargs=-1, type=FILE)
@click.argument("out", type=FILE)
@click.option(
    "--train-from", multiple=True, type=FILE, help="Train a SentencePiece model on this text, and merge it; repeatable."
)
@click.option("--vocab-size", type=click.IntRange(8), default=20000, show_default=True, help="Of the model to train.")
@click.option("--algorithm", type=click.Choice(ALGORITHMS), default="bpe", show_default=True,
              help="Of the model to train. Among LLaMA's, which is BPE, part of unigram's pieces are dead.")  # fmt: skip
@click.option("--characters", is_flag=True, help="Also add every Chinese character from U+4E00 to U+9FFF that is missing.")
@click.option("--scores", type=click.Choice(SCORES), default="after", show_default=True,
              help="Join new pieces after all of LLaMA's, or before, with Chinese-LLaMA's score.")  # fmt: skip
@click.option("--unreachable", type=click.Choice(UNREACHABLE), default="keep", show_default=True,
              help="Pieces that no text is cut into: keep them and their ids, add those they lack, or drop them.")  # fmt: skip
@click.option("--special-token", "special_tokens", multiple=True, metavar="TEXT", help="Add a special token; repeatable.")
@click.option("--pad-token", metavar="TEXT", help="Add a token for padding, the last of all: '[PAD]' in Chinese-Alpaca.")
@click.option("--text", "texts", multiple=True, type=FILE,
              help="Count bytes per token on this.  [default: People's Daily of January 1998, Python's reference]")  # fmt: skip
@click.option("--model", metavar="BASE", type=FILE, help="The tokenizer's model: OUT becomes its checkpoint with new rows.")
@click.option("--new-rows", type=click.Choice(RULES), default="mean", show_default=True,
              help="New rows: the mean of the rows of the token's old parts, or random.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of random rows.")
@click.option("--pad-to-multiple-of", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Fill the rows up; the tokenizer gets no tokens for them.")  # fmt: skip
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of one safetensors file.")
@FORCE
@JSON
@click.pass_context
def command(ctx: click.Context, as_json: bool, max_shard_size: str, **options: Any) -> None:
    """Merge Chinese SentencePiece models into LLaMA's tokenizer, and write it to OUT.

    LLAMA_TOKENIZER is LLaMA's tokenizer.model, or a directory that has it. New pieces follow its own, in order. OUT has
    tokenizer.model and Hugging Face's files; with --model, the extended checkpoint as well.

    \b
    python -m training.merge_tokenizer llama2/ chinese_sp.model merged/
    python -m training.merge_tokenizer llama2/ chinese_sp.model alpaca/ --unreachable add --pad-token '[PAD]'
    python -m training.merge_tokenizer llama2/ chinese_sp.model extended/ --model llama2/ --pad-to-multiple-of 64
    python -m training.merge_tokenizer llama2/ mine/ --train-from corpus.txt --vocab-size 20000
    python -m training.merge_tokenizer llama1/ characters/ --characters --special-token '<|im_start|>'
    """
    for needed, names in _OPTIONS_OF.items():
        given = [name for name in names if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]
        if given and not options[needed]:
            raise click.UsageError(
                f"--{given[0].replace('_', '-')} says something about --{needed.replace('_', '-')}, too: give both."
            )
    max_shard_bytes = byte_size(max_shard_size)
    with Progress(quiet=as_json).bar("merging", "bytes") as progress:
        result = merge_tokenizer(max_shard_bytes=max_shard_bytes, progress=progress, **options)
    emit(result, as_json, _show)


def _show(r: Merged) -> None:
    p = r.pieces
    click.echo(f"{r.path}: {r.tokens} tokens = {r.base} + {p.new} new + {len(p.added)} in between + {r.special} special")
    if r.rows:
        click.echo(f"{r.rows} rows in the embedding and the output head")
    for what, texts in (("added", p.added), ("dropped", p.dropped)):
        if texts:
            click.echo(f"{what}: {one_line(listed(texts, 12))}")
    table(
        ("text", "bytes", "tokens", "now", "bytes/token", "now", "tokens/char", "now"),
        [
            (e.language, str(e.nbytes), str(e.before.tokens), str(e.after.tokens), f"{e.before.bytes_per_token:.4f}",
             f"{e.after.bytes_per_token:.4f}", f"{e.before.tokens_per_character:.4f}", f"{e.after.tokens_per_character:.4f}")
            for e in r.efficiency
        ],
    )  # fmt: skip


if __name__ == "__main__":
    command(prog_name="python -m training.merge_tokenizer")

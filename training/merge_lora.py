"""Base + LoRA adapters → a merged checkpoint, in Hugging Face's form or Meta's, one tensor in memory at a time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cnq import catalog, terminal
from cnq.adapters import Effect, merge, read_adapter
from cnq.adapters.settings import CONFIG
from cnq.checkpoint import open_checkpoint
from cnq.errors import OutputExists
from cnq.files import byte_size, require_memory
from cnq.options import FORCE, JSON, Command
from cnq.to_hf import DTYPES, Restored, write_hf

from .to_meta import WrittenMeta, write_meta


@dataclass(frozen=True)
class Merged:
    """dtype: of the first matrix. effects: what each adapter did, in order. memory: bytes needed at the largest tensor."""

    path: Path
    output_type: str
    dtype: str
    effects: tuple[Effect, ...]
    n_tensors: int
    nbytes: int
    memory: int
    notes: tuple[str, ...]
    seconds: float


def merge_lora(
    base: Path,
    loras: Sequence[Path],
    dst: Path,
    *,
    output_type: str = "huggingface",
    dtype: str = "auto",
    max_shard_bytes: int = 2_000_000_000,
    shards: int = 0,
    alpha: float | None = None,
    rank: int | None = None,
    force: bool = False,
    say: Callable[[str], object] = lambda text: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Merged:
    """Merge adapters, in this order, into a base and write the directory `dst`.

    output_type: huggingface, or pth = Meta's layout. dtype: f16, bf16, f32, or auto = each tensor's type in the base; sums
    are made in float32 and rounded to it once. max_shard_bytes: of a safetensors file. shards: of Meta's layout; 0 = as many
    as Meta has. alpha, rank: of adapters without adapter_config.json. say: hears of the memory needed, before the work starts.
    Raises what open_checkpoint, read_adapter, merge and the writers raise, and NoSpace when the memory is too small.
    """
    started = time.perf_counter()
    adapters = [read_adapter(path, alpha=alpha, rank=rank) for path in loras]
    merging = merge(open_checkpoint(base), adapters, DTYPES.get(dtype))
    for path in (base, *loras):
        if path.resolve().is_relative_to(dst.resolve()):
            raise OutputExists(f"{dst} holds {path}, which is merged from. Name another output.")
    say(f"needs {terminal.size(merging.memory)} of memory for the largest tensor, besides Python and torch themselves")
    require_memory(merging.memory, f"merge into {base}")
    written: WrittenMeta | Restored
    if output_type == "pth":
        written = write_meta(merging.checkpoint, dst, shards=shards, force=force, progress=progress)
    else:
        written = write_hf(
            merging.checkpoint, dst, dtype=dtype, max_shard_bytes=max_shard_bytes, force=force, progress=progress
        )
    return Merged(
        path=dst,
        output_type=output_type,
        dtype=next(e.type.name for e in merging.checkpoint.entries.values() if len(e.shape) > 1),
        effects=merging.effects(),
        n_tensors=written.n_tensors,
        nbytes=written.nbytes,
        memory=merging.memory,
        notes=(*written.notes, *merging.notes()),
        seconds=time.perf_counter() - started,
    )


@click.command(cls=Command)
@click.argument("base")
@click.argument("loras", nargs=-1, metavar="LORA...")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--output-type", type=click.Choice(["huggingface", "pth"]), default="huggingface", show_default=True)
@click.option("--max-shard-size", default="2GB", show_default=True, help="Of one safetensors file.")
@click.option("--shards", type=click.Choice(["0", "1", "2", "4", "8"]), default="0", show_default=True,
              help="Of pth; 0 = as many as Meta has for the model's size.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True, help="auto = the base's.")
@click.option("--lora-alpha", "alpha", type=float, help="Of adapters without adapter_config.json.")
@click.option("--lora-rank", "rank", type=click.IntRange(1), help="Of adapters without adapter_config.json.")
@FORCE
@JSON
def main(base: str, loras: Sequence[str], out: Path, max_shard_size: str, shards: str, as_json: bool, **options: Any) -> None:
    """Merge one or more LoRA adapters, in this order, into BASE, and write the directory OUT.

    BASE is a directory (Hugging Face's or Meta's layout), a hub id, or a name from `cnq models`, whose own adapters come
    first. LORA is the directory of an adapter or a hub id. What is downloaded goes to models/<name>.

    \b
    python -m training.merge_lora llama-7b-hf/ chinese-llama-plus-lora/ chinese-alpaca-plus-lora/ alpaca-plus-7b/
    python -m training.merge_lora 7b-plus zh-models/7B --output-type pth
    """
    size = byte_size(max_shard_size)
    entry = catalog.with_loras(catalog.find(base), loras)
    if not entry.loras:
        raise click.UsageError("no LORA to merge: BASE LORA... OUT")
    report = terminal.Progress(quiet=as_json)
    folder = Path("models") / entry.name
    adapters = catalog.fetch_loras(entry, folder / "loras", report.say)
    if (options["alpha"], options["rank"]) != (None, None) and all((path / CONFIG).is_file() for path in adapters):
        raise click.UsageError(f"--lora-alpha and --lora-rank: every adapter has its {CONFIG}, which says them.")
    source = catalog.fetch(entry, folder / "source", report.say)
    with report.bar("merging", "bytes") as progress:
        result = merge_lora(
            source, adapters, out, max_shard_bytes=size, shards=int(shards), say=report.say, progress=progress, **options
        )
    terminal.emit(result, as_json, _show)


def _show(result: Merged) -> None:
    def row(effect: Effect) -> tuple[str, ...]:
        ranks, scales = ("/".join(f"{n:g}" for n in numbers) for numbers in (effect.ranks, effect.scales))
        return effect.adapter, str(effect.modules), ranks, scales, f"{effect.largest:.4f}", effect.largest_in, str(effect.whole)

    table = ("adapter", "modules", "rank", "scale", "‖Δ‖/‖W‖", "largest in", "whole")
    terminal.table(table, [row(effect) for effect in result.effects], width=100)
    click.echo(
        f"{result.path}/: {result.n_tensors} tensors, {result.dtype}, {terminal.size(result.nbytes)} in {result.seconds:.1f} s"
    )


if __name__ == "__main__":
    main(prog_name="python -m training.merge_lora")

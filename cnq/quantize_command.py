"""`cnq quantize`: to a type, to a size, or as a recipe says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from . import terminal
from .options import FILE, FORCE, JSON, ROUNDING, THREADS, Command


@click.command(cls=Command)
@click.argument("src", type=FILE)
@click.argument("dst", type=FILE)
@click.option("-t", "--type", help="Quantization, e.g. Q4_K_M; a wrong name lists all that llama.cpp offers.")
@click.option(
    "--size", metavar="SIZE", help="Instead of a type: the best mixture of types for a file of this size, e.g. 4.2GB."
)
@click.option("--bpw", type=click.FloatRange(1, 32), help="The same, for so many bits per weight.")
@click.option("--max-ram", metavar="SIZE", is_flag=False, flag_value="",
              help="The same, to run with its context in so much memory; without SIZE: in what is free here.")  # fmt: skip
@click.option("--recipe", type=FILE, help="The types that a .recipe.toml gives, of this model or another of its family.")
@click.option("--imatrix", type=FILE, help="Importance matrix, GGUF or legacy .dat; the smallest types need one.")
@click.option("--tensor-type", "tensor_types", multiple=True, metavar="PATTERN=TYPE",
              help="Another type for tensors whose name the regular expression finds; repeatable.")  # fmt: skip
@click.option("--output-type", help="Type of output.weight.")
@click.option("--embedding-type", help="Type of token_embd.weight.")
@click.option("--pure", is_flag=True, help="One type throughout instead of llama.cpp's mixture.")
@click.option("--allow-requantize", is_flag=True, help="Quantize what is quantized already.")
@click.option("--rounding", type=ROUNDING,
              help="compensated: errors make up for each other, by what imatrix --hessian left beside the imatrix; sequential: "
              "for those of earlier layers too.  [default: compensated where that is, else plain]")  # fmt: skip
@click.option("--effort", type=click.Choice(["fast", "normal", "thorough"]), default="normal", show_default=True,
              help="With --size: how much is measured; kept for the next size.")  # fmt: skip
@click.option("--types", metavar="TYPE,...", help="With --size: the types to choose from.")
@click.option("--prefer-repacked", is_flag=True, help="With --size: prefer types that llama.cpp repacks for this processor.")
@click.option("--text", "texts", multiple=True, help="With --size: file to measure sensitivities on; repeatable.")
@click.option("--held-out", multiple=True, help="With --size: file to judge by; repeatable.  [default: reviews and licences]")
@click.option("--eval-chunks", type=click.IntRange(0), default=20, show_default=True,
              help="With --size: held-out chunks to judge by; 0 = take the mixture on trust.")  # fmt: skip
@click.option(
    "--ctx", "n_ctx", type=click.IntRange(16), help="With --max-ram: tokens of context.  [default: the model's, ≤ 4096]"
)
@click.option("--dry-run", is_flag=True, help="Only show what each tensor becomes, and the exact size of the file.")
@THREADS
@FORCE
@JSON
def quantize(
    src: Path,
    dst: Path,
    as_json: bool,
    dry_run: bool,
    force: bool,
    threads: int,
    type: str | None,
    recipe: Path | None,
    tensor_types: Sequence[str],
    **options: Any,
) -> None:
    """Shrink the float GGUF SRC into DST: to a type, or to a size.

    With a type and plain rounding, to the bit as llama-quantize does. With a size (docs/size-budget.md) each tensor gets the
    type that loses least within it, as measured; the result is compared with the stock mixture, and the better one kept.

    \b
    cnq quantize a2-f16.gguf a2-q4.gguf -t Q4_K_M
    cnq quantize a2-f16.gguf a2-iq2.gguf -t IQ2_M --imatrix a2.imatrix.gguf
    cnq quantize a2-f16.gguf a2-q4.gguf -t Q4_K_M --imatrix a2.imatrix.gguf --rounding compensated
    cnq quantize a2-f16.gguf a2-mix.gguf -t Q4_K_M --tensor-type 'attn_v=Q8_0' --dry-run
    cnq quantize a2-f16.gguf a2-4g.gguf --size 4GB --imatrix a2.imatrix.gguf
    cnq quantize a2-f16.gguf a2-ram.gguf --max-ram 6GB --imatrix a2.imatrix.gguf
    cnq quantize b2-f16.gguf b2-4g.gguf --recipe a2-4g.recipe.toml --imatrix b2.imatrix.gguf
    """
    sized = {name: options.pop(name) for name in _SIZED}
    given = [f"--{name.replace('_', '-')}" for name in _BUDGETS if sized[name] is not None]
    given += [name for name, value in (("--type", type), ("--recipe", recipe)) if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise click.UsageError(f"give one of --type, --size, --bpw, --max-ram, --recipe; {found} was given.")
    wishes = [_wish(w) for w in tensor_types]
    for name in ("output_type", "embedding_type"):
        options[name] = options[name] and options[name].upper()
    if type is None and recipe is None:
        if options["pure"] or options["allow_requantize"]:
            raise click.UsageError("--pure and --allow-requantize are for types, not for sizes.")
        ends = ((r"^token_embd\.weight$", options["embedding_type"]), (r"^output\.weight$", options["output_type"]))
        sized["tensor_types"] = [*((pattern, wish) for pattern, wish in ends if wish), *wishes]
        _quantize_to_size(src, dst, sized, options["imatrix"], options["rounding"], threads, force, dry_run, as_json)
        return
    from .engine.child import started_early

    with started_early("cnq.engine.worker"):
        from .quantize import plan, quantize

        if recipe:
            type, options["rounding"], types, told = _of_recipe(src, recipe, options["imatrix"], options["rounding"])
            wishes += types
            for note in told:
                click.echo(f"note: {note}", err=True)
        assert type is not None
        if dry_run:
            terminal.emit(plan(src, type, tensor_types=wishes, **options), as_json, terminal.show_plan)
            return
        with terminal.Progress(quiet=as_json).bar("quantizing", "tensors") as progress:
            result = quantize(
                src,
                dst,
                type,
                force=force,
                threads=threads,
                tensor_types=wishes,
                progress=lambda _, i, n: progress(i, n),
                **options,
            )
    terminal.emit(result, as_json, terminal.show_quantized)


_BUDGETS = ("size", "bpw", "max_ram")
_SIZED = (*_BUDGETS, "effort", "types", "prefer_repacked", "texts", "held_out", "eval_chunks", "n_ctx")


def _quantize_to_size(
    src: Path, dst: Path, sized: dict[str, Any], imatrix: Path | None, rounding: str | None, threads: int, force: bool,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    from .allocate.gate import quantize_to_size
    from .allocate.measure import N_CTX, text_of
    from .allocate.search import allocate, repacked_here
    from .corpus import cutter
    from .imatrix_file import read_imatrix
    from .named_texts import named_sources
    from .texts import calibration_texts, unlike_texts

    sources, special = named_sources(src, sized["texts"])
    skip = read_imatrix(imatrix).n_chunks if imatrix and not sources else 0
    text = text_of(sources or calibration_texts(), skip, special)
    options: dict[str, Any] = {
        "imatrix": imatrix,
        "rounding": rounding,
        "types": sized["types"].split(",") if sized["types"] else (),
        "tensor_types": sized["tensor_types"],
        "effort": sized["effort"],
        "repacked": repacked_here() if sized["prefer_repacked"] else None,
        "threads": threads,
        "progress": terminal.Progress(quiet=as_json),
    }
    budget = _budget(src, sized)
    if dry_run:
        terminal.emit(allocate(src, budget, text, **options), as_json, terminal.show_allocation)
        return
    judges, special = named_sources(src, sized["held_out"])
    held_out = cutter(judges or unlike_texts(), N_CTX, sized["eval_chunks"], special=special) if sized["eval_chunks"] else None
    result = quantize_to_size(src, dst, budget, text, held_out, force=force, **options)
    terminal.emit(result, as_json, terminal.show_sized)


def _budget(src: Path, sized: dict[str, Any]) -> Any:
    from .allocate.search import Budget
    from .context import room_for_weights
    from .files import byte_size
    from .gguf_file import GgufFile

    if sized["max_ram"] is not None:
        memory = byte_size(sized["max_ram"]) if sized["max_ram"] else None
        return Budget(room_for_weights(GgufFile(src), sized["n_ctx"], memory), clipped=True)
    return Budget(byte_size(sized["size"]) if sized["size"] else None, sized["bpw"])


def _of_recipe(
    src: Path, path: Path, imatrix: Path | None, rounding: str | None
) -> tuple[str, str, list[tuple[str, str]], list[str]]:
    """A recipe's type, rounding, tensor types for this model, and what the user should know."""
    from .allocate.recipe import applied, read_recipe, unlike
    from .gguf_file import GgufFile
    from .quantize import anchored, plan

    recipe = read_recipe(path)
    quantized = [t.name for t in plan(src, "Q4_K_M").tensors if t.type != t.from_type or t.wanted]
    types = applied(recipe, GgufFile(src), quantized)
    return recipe.type, rounding or recipe.rounding, anchored(types), unlike(recipe, types, imatrix, rounding)


def _wish(text: str) -> tuple[str, str]:
    pattern, sign, type = text.rpartition("=")
    if not sign or not pattern:
        raise click.BadParameter(f"{text!r}: expected PATTERN=TYPE, e.g. attn_v=Q8_0.", param_hint="--tensor-type")
    return pattern, type.upper()

"""The command line: flags in, one call, one result out. Here what makes and measures a model; others are in
quantize_command and run_commands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from . import __version__, terminal
from .options import CTX, FILE, FORCE, FORMAT, JSON, ROUNDING, THREADS, Cli, prepare
from .quantize_command import quantize
from .run_commands import bench, chat, doctor, ollama, serve, web

HESSIAN_MEMORY = click.option(
    "--hessian-memory", metavar="SIZE", help="For second moments, e.g. 4GB; less = more passes.  [default: what is free]"
)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """From a Chinese LLaMA checkpoint to a chat on an ordinary CPU.

    \b
    cnq build tiny                       the whole road with a small model
    cnq build 7b -t Q4_K_M -t Q5_K_M     Chinese-Alpaca-2-7B in two sizes
    """
    prepare()


@cli.command()
@click.argument("model")
@click.option(
    "-t", "--type", "types", multiple=True, help="Quantization; repeatable.  [default: Q4_K_M, unless --size is given]"
)
@click.option("--size", metavar="SIZE", help="The best mixture of types for a file of this size, e.g. 4.2GB.")
@click.option("--bpw", type=click.FloatRange(1, 32), help="The same, for so many bits per weight.")
@click.option("--effort", type=click.Choice(["fast", "normal", "thorough"]), default="normal", show_default=True,
              help="With --size: how much is measured.")  # fmt: skip
@click.option("--frontier", is_flag=True, help="The best mixtures for the sizes of five of llama.cpp's, beside these.")
@click.option("--lora", "loras", multiple=True, help="Adapter to merge into MODEL, directory or hub id; repeatable, in order.")
@click.option("--out", type=FILE, help="Where everything goes.  [default: models/<name>]")
@FORMAT
@click.option("--dtype", type=click.Choice(["f16", "bf16", "f32"]), default="f16", show_default=True, help="Of the float GGUF.")
@click.option("--chunks", type=click.IntRange(0), default=100, show_default=True, help="Of the importance matrix; 0 = without.")
@click.option("--eval-chunks", type=click.IntRange(0), default=40, show_default=True, help="To measure on; 0 = do not measure.")
@click.option("--rounding", type=ROUNDING, default="compensated", show_default=True,
              help="compensated: errors make up for each other; sequential: for those of earlier layers too, in several times "
              "the time; plain: each weight by itself, no statistics kept.")  # fmt: skip
@HESSIAN_MEMORY
@click.option("--prompt", is_flag=False, flag_value="", help="Ask the result this; without a text, the model's own question.")
@THREADS
@JSON
def build(
    model: str,
    as_json: bool,
    prompt: str | None,
    hessian_memory: str | None,
    types: Sequence[str],
    size: str | None,
    bpw: float | None,
    **options: Any,
) -> None:
    """Take MODEL the whole road: download, convert, calibrate, quantize, measure, report.

    MODEL is a name from `cnq models`, a directory, a GGUF file or a hub id. What is up to date is not made again.

    \b
    cnq build tiny
    cnq build 7b -t Q4_K_M -t Q8_0 --out /data/alpaca
    cnq build 7b-plus                                LLaMA + Chinese-LLaMA-Plus + Chinese-Alpaca-Plus
    cnq build 7b --lora my-adapter/
    cnq build ./my-merged-model --format llama-2
    cnq build 7b --size 4GB                          the types that lose least in 4 GB
    """
    from .allocate.search import Budget
    from .build import build
    from .files import byte_size

    if size and bpw:
        raise click.UsageError("give --size or --bpw, not both.")
    memory = byte_size(hessian_memory) if hessian_memory else 0
    budget = Budget(byte_size(size) if size else None, bpw) if size or bpw else None
    types = types or (() if budget or options["frontier"] else ("Q4_K_M",))
    progress = terminal.Progress(quiet=as_json)
    result = build(model, types, hessian_memory=memory, budget=budget, progress=progress, **options)
    terminal.emit(result, as_json, terminal.show_built)
    if prompt is not None and not as_json:
        from .chat import open_chat

        question = prompt or result.question
        with open_chat(result.result, format=options["format"], threads=options["threads"], max_tokens=256) as talk:
            click.echo(f"\n>>> {question}")
            terminal.stream(talk.ask(question))


@cli.command()
@JSON
def models(as_json: bool) -> None:
    """List what MODEL may be, with the size and memory of a Q4_K_M.

    \b
    cnq models
    """
    from . import catalog

    terminal.emit(list(catalog.models().values()), as_json, terminal.show_models)


@cli.command()
@click.argument("src", type=FILE)
@click.argument("dst", type=FILE)
@click.option("--dtype", type=click.Choice(["auto", "f16", "bf16", "f32", "q8_0"]), default="auto", show_default=True,
              help="Of the matrices; auto = the checkpoint's.")  # fmt: skip
@click.option("--name", help="general.name.  [default: from the model card or the directory]")
@click.option("--format", help="Prompt format to write when the checkpoint has no chat template: alpaca, llama-2, …")
@click.option("--lora", "loras", type=FILE, multiple=True, help="Adapter to merge on the way; repeatable, in order.")
@FORCE
@JSON
def convert(as_json: bool, **options: Any) -> None:
    """Write the checkpoint SRC as the float GGUF DST.

    SRC is a Hugging Face directory, one with Meta's consolidated.*.pth and params.json, or a GGUF.

    \b
    cnq convert chinese-alpaca-2-7b/ a2-f16.gguf --dtype f16
    cnq convert llama/13B llama-13b.gguf
    cnq convert my-sft-model/ my.gguf --format llama-2
    cnq convert chinese-alpaca-2-7b/ my.gguf --lora my-adapter/
    """
    from .convert import convert

    with terminal.Progress(quiet=as_json).bar("converting", "bytes") as progress:
        result = convert(progress=progress, **options)
    terminal.emit(result, as_json, lambda r: click.echo(
        f"{r.path}: {r.arch}, {r.dtype}, {r.n_tensors} tensors, {r.n_params:,} weights, {r.n_vocab} tokens, "
        f"{terminal.size(r.nbytes)} in {r.seconds:.1f} s"
    ))  # fmt: skip


@cli.command("convert-lora")
@click.argument("src", type=FILE)
@click.argument("dst", type=FILE)
@click.option("--base", type=FILE, required=True, help="The checkpoint that the adapter was trained on.")
@click.option("--dtype", type=click.Choice(["f32", "f16", "bf16", "q8_0"]), default="f32", show_default=True)
@FORCE
@JSON
def convert_lora_command(as_json: bool, **options: Any) -> None:
    """Write the LoRA adapter SRC as the GGUF DST, which llama.cpp and Ollama lay over the base's GGUF at run time.

    Only for adapters of low-rank changes and nothing else; others have to be merged: cnq convert --lora.

    \b
    cnq convert-lora my-adapter/ my-adapter.gguf --base chinese-alpaca-2-7b/
    """
    from .convert_lora import convert_lora

    terminal.emit(convert_lora(**options), as_json, lambda r: click.echo(
        f"{r.path}: {r.arch}, {r.dtype}, {r.n_modules} matrices, alpha {r.alpha:g}, {terminal.size(r.nbytes)} "
        f"in {r.seconds:.1f} s"
    ))  # fmt: skip


cli.add_command(quantize)


@cli.command()
@click.argument("gguf", type=FILE)
@click.argument("texts", nargs=-1, metavar="[TEXT[=WEIGHT]]...")
@click.option("-o", "--output", type=FILE, help="[default: GGUF's name with .imatrix.gguf]")
@click.option("--chunks", type=click.IntRange(2), default=100, show_default=True, help="How many, of --ctx tokens each.")
@CTX
@click.option("--merge", multiple=True, type=FILE, help="Add another importance matrix; repeatable.")
@click.option("--process-output", is_flag=True, help="Collect for output.weight too.")
@click.option("--legacy", is_flag=True, help="Write the old .dat form.")
@click.option(
    "--hessian", is_flag=True, help="Collect what compensated and sequential rounding take, in a folder beside the output."
)
@HESSIAN_MEMORY
@click.option(
    "--save-every", type=click.IntRange(1), default=10, show_default=True, help="Chunks between states to resume from."
)
@FORMAT
@THREADS
@FORCE
@JSON
def imatrix(
    gguf: Path,
    texts: Sequence[str],
    output: Path | None,
    chunks: int,
    format: str | None,
    n_ctx: int,
    hessian_memory: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Collect the importance matrix of the float GGUF on TEXT; default: Chinese newspaper text and English prose.

    TEXT is .txt, .jsonl, Alpaca .json or .parquet; with several, a weight gives each its share of the chunks. An interrupted
    run goes on where its last state was saved.

    \b
    cnq imatrix a2-f16.gguf
    cnq imatrix a2-f16.gguf zh.txt=65 en.txt=25 code.txt=10 -o a2.imatrix.gguf
    cnq imatrix a2-f16.gguf --hessian --hessian-memory 8GB
    """
    from .corpus import cutter
    from .files import byte_size
    from .imatrix import collect
    from .named_texts import named_sources
    from .texts import calibration_texts

    sources, special = named_sources(gguf, texts, format)
    text = cutter(sources or calibration_texts(), n_ctx, chunks, None if sources else "calibration", special=special)
    dst = output or gguf.with_name(f"{gguf.stem}.imatrix.{'dat' if options['legacy'] else 'gguf'}")
    with terminal.Progress(quiet=as_json).bar("calibrating", "chunks") as progress:
        memory = byte_size(hessian_memory) if hessian_memory else 0
        result = collect(gguf, text, dst, n_ctx=n_ctx, hessian_memory=memory, progress=progress, **options)
    terminal.emit(result, as_json, terminal.show_collected)


@cli.command()
@click.argument("ggufs", nargs=-1, required=True, type=FILE, metavar="GGUF...")
@click.option("--against", type=FILE, help="The float GGUF they were made from: adds KL divergence, top-1 agreement, Δp.")
@click.option("--text", "texts", multiple=True, help="File to measure on; repeatable.  [default: held-out newspaper text]")
@click.option("--chunks", type=click.IntRange(2), default=40, show_default=True, help="How many, of --ctx tokens each.")
@CTX
@click.option("--logits", type=FILE, help="llama-perplexity's file of base logits: read if it exists, else written.")
@click.option("--choices", type=FILE, help="Folder of examinations (C-Eval, CMMLU): score these instead of a text.")
@click.option("--shots", type=click.IntRange(0, 5), default=0, show_default=True, help="Worked examples before each question.")
@FORMAT
@THREADS
@JSON
def evaluate(
    ggufs: Sequence[Path],
    against: Path | None,
    texts: Sequence[str],
    chunks: int,
    format: str | None,
    n_ctx: int,
    logits: Path | None,
    choices: Path | None,
    shots: int,
    threads: int,
    as_json: bool,
) -> None:
    """Measure perplexity and bits per byte of GGUFs, and what they lost against the float model.

    With --choices: the share of right answers, by the likeliest of A to D.

    \b
    cnq evaluate a2-q4.gguf --choices ceval-exam --shots 5
    cnq evaluate a2-q4.gguf --against a2-f16.gguf
    cnq evaluate a2-q4.gguf a2-q5.gguf --against a2-f16.gguf --text novel.txt --chunks 100
    """
    from .choices import score_choices
    from .corpus import cutter, peoples_daily
    from .evaluate import evaluate
    from .named_texts import named_sources

    if choices:
        scored = []
        for gguf in ggufs:
            with terminal.Progress(quiet=as_json).bar(f"examining {gguf.name}", "questions") as progress:
                scored.append(score_choices(gguf, choices, shots=shots, threads=threads, progress=progress))
        terminal.emit(scored, as_json, terminal.show_choices)
        return
    stored = logits is not None and logits.exists()
    text = None
    if not stored:
        sources, special = named_sources(against or ggufs[0], texts, format)
        sources = sources or [peoples_daily("held-out")]
        text = cutter(sources, n_ctx, chunks, None if texts else "held-out", special=special)
    with terminal.Progress(quiet=as_json).bar("measuring", "chunks") as progress:
        result = evaluate(ggufs, text, base=against, logits=logits, n_ctx=n_ctx, threads=threads, progress=progress)
    terminal.emit(result, as_json, terminal.show_evaluation)


@cli.command("to-hf")
@click.argument("src", type=FILE)
@click.argument("dst", type=FILE)
@click.option("--dtype", type=click.Choice(["auto", "f16", "bf16", "f32"]), default="auto", show_default=True,
              help="auto = every tensor as it is; what is quantized becomes f16.")  # fmt: skip
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of one safetensors file.")
@FORCE
@JSON
def to_hf_command(as_json: bool, max_shard_size: str, **options: Any) -> None:
    """Write the checkpoint SRC as the Hugging Face checkpoint DST, a directory.

    SRC is a GGUF, a directory with Meta's consolidated.*.pth and params.json, or a Hugging Face directory.

    \b
    cnq to-hf model.gguf model-hf/
    cnq to-hf llama/13B llama-13b-hf/ --max-shard-size 2GB
    """
    from .files import byte_size
    from .to_hf import to_hf

    size = byte_size(max_shard_size)
    with terminal.Progress(quiet=as_json).bar("restoring", "bytes") as progress:
        result = to_hf(max_shard_bytes=size, progress=progress, **options)
    lossy = lambda r: f"; {r.decoded} were quantized, and stay as exact as that" if r.decoded else ""  # noqa: E731
    terminal.emit(result, as_json, lambda r: click.echo(
        f"{r.path}/: {r.arch}, {r.dtype}, {r.n_tensors} tensors{lossy(r)}, {terminal.size(r.nbytes)} in {r.seconds:.1f} s"
    ))  # fmt: skip


@cli.command()
@click.argument("gguf", type=FILE)
@JSON
def inspect(gguf: Path, as_json: bool) -> None:
    """Show what is in a GGUF; of an importance matrix, the statistics of each tensor's inputs.

    \b
    cnq inspect models/tiny/SmolLM2-135M-Instruct.imatrix.gguf
    cnq inspect models/tiny/SmolLM2-135M-Instruct-Q4_K_M.gguf
    """
    from .imatrix_file import is_imatrix, read_imatrix
    from .imatrix_stats import statistics
    from .inspection import inspect

    if is_imatrix(gguf):
        terminal.emit(statistics(read_imatrix(gguf)), as_json, terminal.show_statistics)
        return
    terminal.emit(inspect(gguf), as_json, terminal.show_inspected)


for command in (doctor, bench, ollama, chat, serve, web):
    cli.add_command(command)

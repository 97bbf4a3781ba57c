"""The command line: flags in, one call, one result out. Here what makes and measures a model; run_commands has the rest."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from . import __version__, terminal
from .options import CTX, FILE, FORCE, FORMAT, JSON, THREADS, Cli, prepare
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
@click.option("--rounding", type=click.Choice(["compensated", "plain"]), default="compensated", show_default=True,
              help="compensated: errors make up for each other; plain: each weight by itself, no statistics kept.")  # fmt: skip
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


@cli.command()
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
@click.option("--rounding", type=click.Choice(["compensated", "plain"]), help="compensated: errors make up for each other, by "
              "what imatrix --hessian left beside the imatrix.  [default: compensated where that is, else plain]")  # fmt: skip
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
    from . import corpus
    from .allocate.gate import quantize_to_size
    from .allocate.measure import text_of
    from .allocate.search import allocate, repacked_here
    from .imatrix_file import read_imatrix
    from .texts import calibration_texts, unlike_texts

    sources, special = _sources(src, sized["texts"], None)
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
    judges, special = _sources(src, sized["held_out"], None)

    def held_out(model: Any) -> Any:
        def tokenize(text: str) -> list[int]:
            return list(model.tokenize(text, add_special=True, parse_special=special))

        return corpus.chunks(judges or unlike_texts(), tokenize, 512, sized["eval_chunks"])

    result = quantize_to_size(src, dst, budget, text, held_out if sized["eval_chunks"] else None, force=force, **options)
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


@cli.command()
@click.argument("gguf", type=FILE)
@click.argument("texts", nargs=-1, metavar="[TEXT[=WEIGHT]]...")
@click.option("-o", "--output", type=FILE, help="[default: GGUF's name with .imatrix.gguf]")
@click.option("--chunks", type=click.IntRange(2), default=100, show_default=True, help="How many, of --ctx tokens each.")
@CTX
@click.option("--merge", multiple=True, type=FILE, help="Add another importance matrix; repeatable.")
@click.option("--process-output", is_flag=True, help="Collect for output.weight too.")
@click.option("--legacy", is_flag=True, help="Write the old .dat form.")
@click.option("--hessian", is_flag=True, help="Collect what compensated rounding needs too, in a folder beside the output.")
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
    from .files import byte_size
    from .imatrix import collect

    text = _text(gguf, texts, "calibration", chunks, n_ctx, format)
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
    from .evaluate import evaluate

    if choices:
        scored = []
        for gguf in ggufs:
            with terminal.Progress(quiet=as_json).bar(f"examining {gguf.name}", "questions") as progress:
                scored.append(score_choices(gguf, choices, shots=shots, threads=threads, progress=progress))
        terminal.emit(scored, as_json, terminal.show_choices)
        return
    stored = logits is not None and logits.exists()
    text = None if stored else _text(against or ggufs[0], texts, "held-out", chunks, n_ctx, format)
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


def _text(gguf: Path, texts: Sequence[str], split: str, n_chunks: int, n_ctx: int, format: str | None) -> Callable[[Any], Any]:
    """What makes chunks of the texts named, or of the default corpus, with a model's own tokenizer and prompt format."""
    from . import corpus
    from .texts import calibration_texts

    sources, dialogues = _sources(gguf, texts, format)

    def chunks(model: Any) -> Any:
        return corpus.chunks(
            sources or (calibration_texts() if split == "calibration" else [corpus.peoples_daily("held-out")]),
            lambda text: model.tokenize(text, add_special=True, parse_special=dialogues),
            n_ctx,
            n_chunks,
            split if not sources else None,
        )

    return chunks


def _sources(gguf: Path, texts: Sequence[str], format: str | None) -> tuple[list[Any], bool]:
    """The texts named, conversations in the model's prompt format; and whether special tokens in them are meant."""
    from . import corpus, prompts
    from .gguf_file import GgufFile

    fields = GgufFile(gguf).fields
    jinja = prompts.named(format).jinja if format else prompts.template_of(fields)
    bos, eos = prompts.token_text(fields, "bos"), prompts.token_text(fields, "eos")

    def rendered(messages: list[prompts.Message]) -> str:
        assert jinja
        text = prompts.render(jinja, messages, bos=bos, eos=eos, add_generation_prompt=False)
        return text.removeprefix(bos)  # the tokenizer adds it

    render = rendered if jinja else None
    named = [re.fullmatch(r"(.*?)(?:=([\d.]+))?", text) for text in texts]
    sources = [corpus.read_source(Path(m[1]), render, float(m[2] or 1)) for m in named if m]
    return sources, any(s.name.endswith((".json", ".jsonl", ".parquet")) for s in sources)


def _wish(text: str) -> tuple[str, str]:
    pattern, sign, type = text.rpartition("=")
    if not sign or not pattern:
        raise click.BadParameter(f"{text!r}: expected PATTERN=TYPE, e.g. attn_v=Q8_0.", param_hint="--tensor-type")
    return pattern, type.upper()

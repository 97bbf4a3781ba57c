"""The commands that run what was made: in the terminal, as a server, on a page, in Ollama; and look at the machine."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from . import terminal
from .options import FILE, FORMAT, JSON, THREADS, Command


@click.command(cls=Command)
@click.option("--online", is_flag=True, help="Ask the model hub and the package index, too, whether they answer.")
@JSON
def doctor(online: bool, as_json: bool) -> None:
    """Look at this machine: what runs here and how fast to expect, whether llama.cpp is built for it, what is missing.

    \b
    cnq doctor
    """
    from .doctor import doctor
    from .doctor_text import show

    terminal.emit(doctor(online=online), as_json, show)


@click.command(cls=Command)
@click.argument("gguf", type=FILE)
@click.option("--quick", is_flag=True, help="Three short rounds instead of five.")
@click.option("--kv", "type_kv", type=click.Choice(["F16", "Q8_0"], case_sensitive=False),
              help="What keys and values are kept in; Q8_0 halves their memory and changes answers a little.  [default: F16, "
                   "unless that does not fit into memory]")  # fmt: skip
@JSON
def bench(gguf: Path, as_json: bool, **options: Any) -> None:
    """Find out how the GGUF runs fastest on this machine, and remember it for `cnq chat` and whatever else talks with it.

    Threads, batch, flash attention, repacked and locked weights are tried in turns, in a process of their own. What is not
    surely faster stays as llama.cpp has it.

    \b
    cnq bench models/tiny/SmolLM2-135M-Instruct-Q4_K_M.gguf
    cnq bench model-Q4_K_M.gguf --kv q8_0
    """
    from .bench import bench

    report = terminal.Progress(quiet=as_json)
    with report.bar("measuring", "runs") as progress:
        result = bench(gguf, say=report.say, progress=progress, **options)
    terminal.emit(result, as_json, terminal.show_bench)


@click.command(cls=Command)
@click.argument("ggufs", nargs=-1, required=True, type=FILE, metavar="GGUF...")
@click.option("-o", "--output", type=FILE, help="[default: Modelfile beside the GGUF; of several, <GGUF>.Modelfile]")
@click.option("--create", "name", metavar="NAME", help="Make the model in a running Ollama instead; several differ by tag.")
@click.option("--host", metavar="URL", help="Where that Ollama is.  [default: $OLLAMA_HOST, or this machine]")
@FORMAT
@click.option("--force", is_flag=True, help="Replace the Modelfile; create also where the disk may be too small.")
@JSON
def ollama(
    ggufs: Sequence[Path],
    output: Path | None,
    name: str | None,
    host: str | None,
    format: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the Modelfile that makes a GGUF an Ollama model, or make the model at once.

    \b
    cnq ollama models/tiny/SmolLM2-135M-Instruct-Q4_K_M.gguf
    ollama create my-model -f models/tiny/Modelfile
    cnq ollama models/tiny/SmolLM2-135M-Instruct-Q4_K_M.gguf --create my-model
    """
    if output and (name or len(ggufs) > 1):
        raise click.UsageError("--output names the Modelfile of one GGUF.")
    if host and not name:
        raise click.UsageError("--host needs --create.")
    if name:
        from .ollama.create import create, names

        made: list[Any] = []
        shown = terminal.Progress(quiet=as_json)
        for gguf, called in zip(ggufs, names(name, ggufs), strict=True):
            with shown.bar(f"to Ollama: {called}", "bytes") as progress:
                made.append(
                    create(gguf, called, host=host, format=format, force=force, progress=progress, say=shown.say),
                )
        terminal.emit_all(made, as_json, lambda r: click.echo(f"{r.name}: ollama run {r.name}"))
        return
    from .ollama import write_modelfile

    alone = len(ggufs) == 1
    written = []
    for gguf in ggufs:
        dst = output or gguf.with_name("Modelfile" if alone else f"{gguf.stem}.Modelfile")
        written.append(write_modelfile(gguf, dst, format=format, force=force))
    terminal.emit_all(written, as_json, lambda r: click.echo(f"{r.path}: prompt format {r.format or 'left to the GGUF'}"))


@click.command(cls=Command)
@click.argument("gguf", type=FILE)
@click.option("--prompt", help="Ask this, print the answer, and end.")
@click.option("--system", help="What the model is told first.")
@click.option("--session", type=FILE, help="Go on with the conversation in this file, or begin it; it is kept there.")
@FORMAT
@click.option("--ctx", "n_ctx", type=click.IntRange(64),
              help="Context in tokens.  [default: the model's, at most 4096, and what the memory holds]")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), help="Of one answer.  [default: 1024]")
@click.option("--temperature", type=click.FloatRange(0), help="0 = always the likeliest.  [default: the authors' setting]")
@click.option("--no-prompt-cache", is_flag=True, help="Do not keep the computed system text for the next start.")
@THREADS
@JSON
def chat(gguf: Path, prompt: str | None, session: Path | None, no_prompt_cache: bool, as_json: bool, **options: Any) -> None:
    """Talk with a GGUF in the terminal; Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists the commands.

    \b
    cnq chat model-Q4_K_M.gguf
    cnq chat model-Q4_K_M.gguf --session trip.json
    cnq chat model-Q4_K_M.gguf --prompt 用一句话解释什么是量化
    """
    from .chat import converse
    from .sessions import opened

    if as_json and prompt is None:
        raise click.UsageError("--json needs --prompt.")
    with opened(gguf, session, cached=not no_prompt_cache, **options) as kept:
        if prompt is None and sys.stdin.isatty() and sys.stdout.isatty():
            from .chat_terminal.talk import talk

            talk(kept)
        elif prompt is None:
            converse(kept.chat, input, lambda pieces: terminal.show_answer(kept, pieces))
        elif as_json:
            answer = "".join(kept.chat.ask(prompt))
            terminal.emit({"prompt": prompt, "answer": answer, "how": kept.chat.last}, True, click.echo)
        else:
            terminal.show_answer(kept, kept.chat.ask(prompt))


@click.command(cls=Command)
@click.argument("gguf", type=FILE)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; other machines need a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 = any free one.")
@click.option("--api-key", envvar="CNQ_API_KEY", show_envvar=True, help="Refuse requests without it; other users see options.")
@click.option("--parallel", type=click.IntRange(1, 64), help="Answers at a time.  [default: one for every 4 cores, at most 4]")
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, help="More requests that may wait; then 429.")
@click.option("--ctx", "n_ctx", type=click.IntRange(64), help="Tokens of each answer's context.  [default: as for chat]")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Web page that may ask, e.g. http://localhost:3000; repeatable.")
@FORMAT
@THREADS
@JSON
def serve(gguf: Path, as_json: bool, **options: Any) -> None:
    """Serve a GGUF to OpenAI's clients: chat completions, completions, embeddings, models, health.

    \b
    cnq serve model-Q4_K_M.gguf
    CNQ_API_KEY=... cnq serve model-Q4_K_M.gguf --host 0.0.0.0 --parallel 2
    """
    from .serve import serve

    serve(gguf, ready=lambda serving: terminal.emit(serving, as_json, terminal.show_serving), **options)


@click.command(cls=Command)
@click.argument("gguf", type=FILE)
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 = any free one.")
@FORMAT
@click.option("--ctx", "n_ctx", type=click.IntRange(64), help="Context in tokens.  [default: as for chat]")
@THREADS
@JSON
def web(gguf: Path, as_json: bool, **options: Any) -> None:
    """Talk with a GGUF on a page in the browser, on this machine only; Ctrl-C ends it. Needs `pip install 'cnq[web]'`.

    \b
    cnq web model-Q4_K_M.gguf
    """
    from .web import serve_page

    serve_page(gguf, ready=lambda serving: terminal.emit(serving, as_json, terminal.show_page), **options)

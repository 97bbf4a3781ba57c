"""Talk with a Hugging Face checkpoint, with LoRA adapters or without, on a GPU or a CPU; or have it answer a file."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from cnq import terminal
from cnq.errors import CorpusError
from cnq.files import replacing
from cnq.options import FILE, FORCE, JSON, Command
from cnq.prompts import Message

from .engine import LlamaEngine, Sampling

__all__ = ["LlamaEngine", "main", "predict"]
CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Predicted:
    """path: of the answers. config: how they were sampled, as transformers names it."""

    path: Path
    config: Path
    n: int


def predict(
    engine: LlamaEngine,
    data_file: Path,
    predictions_file: Path,
    *,
    with_prompt: bool = False,
    system: str | None = None,
    max_new_tokens: int = 400,
    force: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
    **sampling: Any,
) -> Predicted:
    """Answer the instructions of `data_file`, one a line, into `predictions_file`: a JSON list of {"Input", "Output"}.

    Input is what the model read, without bos. Beside it CONFIG says how answers were sampled. Both appear when all is done.
    with_prompt: in the prompt format, with `system` first; without, the model goes on with the line as it is.
    Raises CorpusError (the file cannot be read, or is empty), OutputExists, what LlamaEngine.generate raises.
    """
    lines = _instructions(data_file)
    how = replace(engine.style.sampling if with_prompt and engine.style else Sampling(), **sampling)
    config = predictions_file.with_name(CONFIG)
    with replacing(predictions_file, force=force) as out, replacing(config, force=force) as settings:
        found = []
        for done, line in enumerate(lines, 1):
            messages = _conversation(line, system)
            prompt = messages if with_prompt else line
            text = engine.prompt_text(messages).removeprefix(engine.tokenizer.bos_token or "") if with_prompt else line
            found.append({"Input": text, "Output": engine.generate(prompt, max_new_tokens=max_new_tokens, **sampling)})
            progress(done, len(lines))
        out.write_text(json.dumps(found, ensure_ascii=False, indent=2), encoding="utf-8")
        settings.write_text(json.dumps(_named(how, max_new_tokens), indent=2), encoding="utf-8")
    return Predicted(predictions_file, config, len(found))


def _instructions(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is no UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    if not lines:
        raise CorpusError(f"{path} holds no instructions. Expected one a line.")
    return lines


def _conversation(text: str, system: str | None) -> list[Message]:
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]


def _named(how: Sampling, max_new_tokens: int) -> dict[str, Any]:
    return {
        "do_sample": how.temperature > 0,
        "temperature": how.temperature,
        "top_k": how.top_k,
        "top_p": how.top_p,
        "repetition_penalty": how.repeat_penalty,
        "max_new_tokens": max_new_tokens,
    }


def converse(
    engine: LlamaEngine,
    ask: Callable[[], str],
    show: Callable[[Iterator[str]], object],
    *,
    with_prompt: bool,
    system: str | None = None,
    **options: Any,
) -> None:
    """Ask and answer until `ask` raises EOFError; Ctrl-C breaks off an answer. with_prompt: one conversation, which grows."""
    messages: list[Message] = _conversation("", system)[:-1]
    while True:
        answer: list[str] = []

        def kept(pieces: Iterator[str], answer: list[str] = answer) -> Iterator[str]:
            for piece in pieces:
                answer.append(piece)
                yield piece

        try:
            if not (text := ask().strip()):
                continue
            if with_prompt:
                messages.append({"role": "user", "content": text})
            show(kept(engine.stream(messages if with_prompt else text, **options)))
        except KeyboardInterrupt:
            click.echo()
        except EOFError:
            return
        if with_prompt and messages and messages[-1]["role"] == "user":
            messages.append({"role": "assistant", "content": "".join(answer).rstrip()})


@click.command(cls=Command)
@click.option("--base", required=True, help="The checkpoint: a Hugging Face directory, or a hub id.")
@click.option("--lora", "loras", multiple=True, help="Adapter to lay over it, directory or hub id; repeatable, in order.")
@click.option("--tokenizer", help="Of another place.  [default: the last adapter's that has one, else the base's]")
@click.option("--format", help="Prompt format: alpaca, llama-2, llama-3, chatml, …  [default: the tokenizer's chat template]")
@click.option("--with-prompt", is_flag=True, help="Put questions into the prompt format; else the model goes on with the text.")
@click.option("--system", help="What the model is told first.")
@click.option("--interactive", is_flag=True, help="Ask in the terminal.")
@click.option("--data-file", type=FILE, help="Instructions to answer, one a line.")
@click.option("--predictions-file", type=FILE, default=Path("predictions.json"), show_default=True, help="Where answers go.")
@click.option("--load-in-kbits", type=click.Choice(["16", "8", "4"]), default="16", show_default=True,
              help="Bits of the weights; 8 and 4 with bitsandbytes.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto", show_default=True,
              help="auto = the checkpoint's; on a CPU float32.")  # fmt: skip
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps; auto = all GPUs, else the CPU."
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=400, show_default=True, help="Of one answer.")
@click.option("--temperature", type=click.FloatRange(0), help="0 = always the likeliest.  [default: the authors' setting]")
@click.option("--top-k", type=click.IntRange(0), help="Only the so many likeliest tokens; 0 = all.  [default: 40]")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Only the likeliest with this probability.  [default: 0.9]")
@click.option("--repeat-penalty", type=click.FloatRange(0, min_open=True), help="1 = none.  [default: the authors' setting]")
@click.option("--seed", type=click.IntRange(0), help="The same answers every time.")
@FORCE
@JSON
def main(
    base: str,
    loras: Sequence[str],
    load_in_kbits: str,
    interactive: bool,
    data_file: Path | None,
    predictions_file: Path,
    with_prompt: bool,
    system: str | None,
    max_new_tokens: int,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Talk with a checkpoint before it is converted, or have it answer a file of instructions.

    \b
    python -m training.chat --base merged/ --with-prompt --interactive
    python -m training.chat --base llama-7b-hf/ --lora chinese-llama-plus-lora/ --lora chinese-alpaca-plus-lora/ \\
        --format alpaca --with-prompt --data-file instructions.txt --predictions-file out/predictions.json
    """
    if interactive == bool(data_file):
        raise click.UsageError("either --interactive or --data-file, and one of them.")
    if system and not with_prompt:
        raise click.UsageError("--system needs --with-prompt.")
    names = ("temperature", "top_k", "top_p", "repeat_penalty", "seed")
    sampling = {name: value for name in names if (value := options.pop(name)) is not None}
    engine = LlamaEngine(base, loras, load_in_kbits=int(load_in_kbits), **options)
    settings = {"with_prompt": with_prompt, "system": system, "max_new_tokens": max_new_tokens, **sampling}
    if not data_file:
        converse(engine, lambda: input(">>> "), terminal.stream, **settings)
        return
    with terminal.Progress(quiet=as_json).bar("answering", "instructions") as progress:
        result = predict(engine, data_file, predictions_file, force=force, progress=progress, **settings)
    terminal.emit(result, as_json, lambda r: click.echo(f"{r.path}: {r.n} answers; {r.config}: how they were sampled"))


if __name__ == "__main__":
    main(prog_name="python -m training.chat")

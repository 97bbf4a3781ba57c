"""The whole mission on a machine without a GPU: a small English model reads Chinese newspapers for some minutes, and goes the
road to a quantized file, measured before and after on newspapers that it did not read.

python tools/demo.py
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import click

from cnq import catalog, terminal
from cnq.build import build
from cnq.chat import open_chat
from cnq.corpus import peoples_daily
from cnq.errors import TrainingError
from cnq.files import replacing
from cnq.machine import instructions
from cnq.options import FILE, JSON, Command
from training.command import silence_libraries
from training.merge_lora import merge_lora
from training.pretrain import read_data
from training.recipe import Pretraining, recipe_of

TYPE = "Q4_K_M"
QUESTION = "请介绍一下中国的首都。"
_ANSWER = 48  # tokens


@dataclass(frozen=True)
class Figures:
    """Of one model: bits per byte of held-out text, by the float file and by the quantized one, and what that one answers."""

    name: str
    float_bits: float
    quantized_bits: float
    nbytes: int
    answer: str


@dataclass(frozen=True)
class Demo:
    """tokens, seconds: of the training; seconds 0 = it was done before. modelfile: for Ollama."""

    before: Figures
    after: Figures
    tokens: int
    training_seconds: float
    seconds: float
    gguf: Path
    modelfile: Path


def demo(
    model: str,
    out: Path,
    *,
    steps: int,
    chunks: int = 100,
    eval_chunks: int = 40,
    rows: int = 4,
    block_size: int = 256,
    progress: terminal.Progress,
) -> Demo:
    """Take `model` the road as it is, train a LoRA, merge it, and take the result the same road. What is done is kept.

    steps: of rows · block_size tokens. chunks, eval_chunks: as for `cnq build`. Raises what the steps raise, and TrainingError
    when the held-out text has not become likelier.
    """
    started = time.perf_counter()
    silence_libraries()
    progress.say("1. the model as it is")
    before = build(model, [TYPE], chunks=chunks, eval_chunks=eval_chunks, progress=progress)
    base = _checkpoint(model, before.result.parent)

    progress.say("2. reading newspapers")
    recipe = _recipe(base, out, steps, rows, block_size)
    seconds = _trained(recipe, progress)

    progress.say("3. the model that has read them")
    merged = out / f"{before.result.parent.name}-zh"
    with progress.bar(f"{recipe.output.name}/ → {merged.name}/", "bytes") as tick:
        merge_lora(base, [recipe.output], merged, force=True, progress=tick)  # the same bits each time: what follows is kept
    after = build(str(merged), [TYPE], out=out, format=before.format, chunks=chunks, eval_chunks=eval_chunks, progress=progress)
    result = Demo(
        before=_figures("before", before.report, before.result, before.format),
        after=_figures("after", after.report, after.result, before.format),
        tokens=steps * rows * block_size,
        training_seconds=seconds,
        seconds=time.perf_counter() - started,
        gguf=after.result,
        modelfile=after.modelfile,
    )
    _require_gain(result.before.float_bits, result.after.float_bits, recipe.output)
    _require_gain(result.before.quantized_bits, result.after.quantized_bits, recipe.output)
    return result


def _require_gain(before: float, after: float, adapter: Path) -> None:
    if not after < before:
        raise TrainingError(
            f"held-out text took {before:.3f} bits a byte before the training and {after:.3f} after it. Remove {adapter}, and "
            "train longer: --steps."
        )


def _checkpoint(model: str, folder: Path) -> Path:
    """The Hugging Face directory that was built from; of a GGUF the one that the build made."""
    path = catalog.find(model).path
    return path if path and path.is_dir() else folder / "hf"


def _text(folder: Path) -> Path:
    """The calibration half of the People's Daily, an article a paragraph: the held-out half is what is measured on."""
    file = folder / "peoples_daily.txt"
    with replacing(file, force=True) as partial:
        articles = peoples_daily("calibration").documents
        partial.write_text("\n\n".join(articles) + "\n", encoding="utf-8")
    return folder


def _recipe(base: Path, out: Path, steps: int, rows: int, block_size: int) -> Pretraining:
    """LoRA on all linear layers. bf16 where the processor computes with it; elsewhere it would be the slower one."""
    return recipe_of(Pretraining, {
        "base": str(base), "data": [str(_text(out / "text"))], "output": str(out / f"lora-{steps}-steps"),
        "documents": "paragraph", "block_size": block_size, "held_out": 0, "cache": str(out / "cache"),
        "lora": {"r": 16, "alpha": 32, "dropout": 0.0}, "dtype": "bf16" if "AVX512_BF16" in (instructions() or ()) else "fp32",
        "use_cpu": True, "gradient_checkpointing": False, "resume_from_checkpoint": True,
        "max_steps": steps, "per_device_train_batch_size": rows, "learning_rate": 2e-3, "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 10, "logging_steps": max(1, steps // 16), "save_steps": max(1, steps // 8),
        "save_total_limit": 1,
    })  # fmt: skip


def _trained(recipe: Pretraining, progress: terminal.Progress) -> float:
    """Train, or go on training, unless the adapter is there: the seconds it took."""
    if (recipe.output / "adapter_config.json").is_file():
        progress.skipped(recipe.output)
        return 0.0
    from training.run import train  # torch and transformers load here

    found = train(recipe, lambda sources: read_data(recipe, sources), quiet=progress.quiet, say=progress.say)
    return found.seconds


def _figures(name: str, report: Path | None, gguf: Path, format: str | None) -> Figures:
    """What a build's report says, and an answer at temperature 0."""
    assert report is not None
    told = json.loads(report.read_text(encoding="utf-8"))
    (quantized,) = told["files"]
    with open_chat(gguf, format=format, max_tokens=_ANSWER, temperature=0, n_ctx=512) as chat:
        answer = " ".join("".join(chat.ask(QUESTION)).split())
    return Figures(
        name, told["base"]["measured"]["bits_per_byte"], quantized["measured"]["bits_per_byte"], gguf.stat().st_size, answer
    )


@click.command(cls=Command)
@click.option("--out", type=FILE, default=Path("models/demo"), show_default=True, help="Where everything goes.")
@click.option("--steps", type=click.IntRange(1), default=64, show_default=True, help="Of 1,024 tokens.")
@JSON
def main(out: Path, steps: int, as_json: bool) -> None:
    """Train a small model on Chinese newspapers on this CPU, and show what it gained: `make demo`.

    Some fifteen minutes on two cores. What is done is kept, so that a second run, also after Ctrl-C, goes on.

    \b
    python tools/demo.py
    python tools/demo.py --steps 300 --out models/longer
    """
    terminal.emit(demo("tiny", out, steps=steps, progress=terminal.Progress(quiet=as_json)), as_json, _show)


def _show(result: Demo) -> None:
    rows = [(f.name, f"{f.float_bits:.3f}", f"{f.quantized_bits:.3f}", terminal.size(f.nbytes), f.answer)
            for f in (result.before, result.after)]  # fmt: skip
    terminal.table(("", "F16 bits/byte", f"{TYPE} bits/byte", f"{TYPE} size", QUESTION), rows, width=110)
    training = f"in {result.training_seconds:.0f} s" if result.training_seconds else "before"
    click.echo(f"trained on {result.tokens:,} tokens {training}; {result.seconds:.0f} s in all")
    click.echo(f"chat    cnq chat {result.gguf}")
    click.echo(f"Ollama  ollama create tiny-zh -f {result.modelfile}")


if __name__ == "__main__":
    main(prog_name="python tools/demo.py")

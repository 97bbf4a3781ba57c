"""Compare types chosen for a size with llama.cpp's own mixtures of that size, on a float model.

    python tools/reference_model.py wide-F16.gguf
    python tools/sizes.py wide-F16.gguf --write

For the size of each mixture: the mixture, rounded plainly, and what `cnq quantize --size` makes with the same imatrix.
Calibrates on cnq's own Chinese and English texts, and measures on texts of other kinds: buyers' reviews and licences. What is
there beside the float model is used again, also by tools/rounding.py. --blocks adds files whose embedding and output have the
mixture's types: what is gained in the blocks alone. --write puts the table into docs/benchmarks.md.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import click
from rounding import FILE, Ran, calibrated, cnq, header, measured, once, put_into_page, rounded, row

from cnq.evaluate import Evaluation
from cnq.fitting import FRONTIER
from cnq.gguf_file import GgufFile
from cnq.paired import compare
from cnq.quantize import plans
from cnq.texts import unlike_texts

BEGIN, END = "<!-- sizes: begin -->", "<!-- sizes: end -->"
ENDS = {"token_embd.weight": "--embedding-type", "output.weight": "--output-type"}
PARAMS_7B = 6_738_415_616  # LLaMA-7B
_GATE = 20  # chunks that cnq quantize --size judges by


@click.command()
@click.argument("gguf", type=FILE)
@click.option("-t", "--type", "types", multiple=True, default=FRONTIER, show_default=True, help="Whose size; repeatable.")
@click.option("--chunks", "n_chunks", default=100, show_default=True, help="Of 512 tokens, for calibration.")
@click.option("--eval-chunks", default=24, show_default=True, help="Of 512 tokens of each text measured on.")
@click.option("--effort", default="normal", show_default=True)
@click.option("--rounding", type=click.Choice(["plain", "compensated"]), default="compensated", show_default=True)
@click.option("--blocks", is_flag=True, help="Also with the mixture's types of embedding and output.")
@click.option("--threads", default=0, help="0 = all cores.")
@click.option("--write", is_flag=True, help="Put the table into docs/benchmarks.md.")
def main(
    gguf: Path, types: tuple[str, ...], n_chunks: int, eval_chunks: int, effort: str, rounding: str, blocks: bool, threads: int,
    write: bool,
) -> None:  # fmt: skip
    """Compare on the float GGUF."""
    imatrix = gguf.with_name(f"{gguf.stem}.imatrix.gguf")
    calibration = once(imatrix, lambda: calibrated(gguf, imatrix, n_chunks, threads))
    stock = {p.type: p for p in plans(gguf, types, imatrix=imatrix, rounding="plain")}
    files: dict[tuple[str, str], Path] = {}
    said: dict[tuple[str, str], Ran] = {}
    for type in types:
        path = files[type, "stock"] = gguf.with_name(f"{gguf.stem}-{type}-plain.gguf")
        once(path, partial(rounded, gguf, path, type, imatrix, "plain", threads))
        ends = {t.name: t.type for t in stock[type].tensors if t.name in ENDS}
        for kind, options in (("size", []), ("blocks", [x for n, t in ends.items() for x in (ENDS[n], t)])):
            if kind == "blocks" and not blocks:
                continue
            own = gguf.with_name(f"{gguf.stem}-{type}-{kind}-{rounding}-{effort}.gguf")
            files[type, kind] = own
            arguments = ("--size", stock[type].nbytes, "--imatrix", imatrix, "--rounding", rounding, "--effort", effort)
            make = partial(cnq, "quantize", gguf, own, *arguments, *options, "--eval-chunks", 0, "--force", threads=threads)
            said[type, kind] = once(own, make)
            assert own.stat().st_size <= stock[type].nbytes, f"{own} exceeds its budget"
    lines = [header(), ""]
    started = time.perf_counter()
    lines += table(gguf, files, eval_chunks, threads)
    each = (time.perf_counter() - started) / (2 * eval_chunks * (len(files) + 1))
    lines += ["", *predicted(said), "", *stages(gguf, said, calibration, each)]
    click.echo("\n".join(lines))
    if write:
        put_into_page(lines, BEGIN, END)


def table(gguf: Path, files: dict[tuple[str, str], Path], n_chunks: int, threads: int) -> list[str]:
    lines = [
        "| size of | bytes | text | KLD mixture → chosen | ratio [95 %] | ratio of medians [95 %] | same top % | difference, "
        "points [95 %] | chunks better |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_text: list[tuple[str, Evaluation]] = []
    for source in unlike_texts():
        by_text.append((source.name, measured(gguf, list(files.values()), source, n_chunks, threads)))
    for type, kind in files:
        if kind == "stock":
            continue
        for name, found in by_text:
            by_path = {m.path: m for m in found.models}
            theirs, mine = by_path[files[type, "stock"]], by_path[files[type, kind]]
            label = type if kind == "size" else f"{type}, blocks only"
            lines.append(row(label, mine.path, name, compare(theirs, mine, found.n_chunks)))
    return lines


def predicted(said: dict[tuple[str, str], Ran]) -> list[str]:
    lines = [
        "| size of | of the budget used | predicted KLD, mixture rounded alike → chosen | gap to the optimum | embedding and "
        "output, % of bytes: mixture → chosen | of predicted KLD |",
        "|---|---|---|---|---|---|",
    ]
    for (type, kind), ran in said.items():
        a = ran.said["allocation"]
        theirs = a["ends_stock"] or (float("nan"), float("nan"))
        before = a["predicted_stock"] or float("nan")
        lines.append(
            f"| {type}{', blocks only' if kind == 'blocks' else ''} | {100 * a['nbytes'] / a['budget']:.3f} % | {before:.4f} → "
            f"{a['predicted']:.4f} | {100 * a['gap']:.4f} % | {100 * theirs[0]:.0f} → {100 * a['ends'][0]:.0f} | "
            f"{100 * theirs[1]:.0f} → {100 * a['ends'][1]:.0f} % |"
        )
    return lines


def stages(gguf: Path, said: dict[tuple[str, str], Ran], calibration: Ran, chunk: float) -> list[str]:
    """What the stages took, and at this speed would take with 7 billion weights: all of them go by the weights.

    chunk: seconds that a model takes to read one.
    """
    (first, *_) = said.values()
    seconds: dict[str, Any] = {"importance matrix and second moments": calibration.seconds}
    seconds |= {s: first.said["seconds"][s] for s in ("reading", "error model", "sensitivities")}
    each = [ran.said["seconds"] for ran in said.values()]
    seconds |= {"solving, each size": sum(s["solving"] for s in each) / len(each)}
    seconds |= {"quantizing, each size": sum(s["quantizing"] for s in each) / len(each)}
    seconds |= {f"gate, each size: {_GATE} chunks, three models": 3 * _GATE * chunk}
    scale = PARAMS_7B / GgufFile(gguf).n_params
    lines = ["| stage | seconds | with 7B weights, extrapolated |", "|---|---|---|"]
    for stage, took in seconds.items():
        # rows are sampled: the error model goes by the width of the matrices, and there are about as many
        more = scale**0.5 if stage == "error model" else 1 if stage.startswith("solving") else scale
        lines.append(f"| {stage} | {took:.1f} | {took * more / 60:.0f} min |")
    return lines


if __name__ == "__main__":
    main()

"""Compare compensated and sequential rounding with plain, on a float model of any size.

    python tools/reference_model.py wide-F16.gguf
    python tools/rounding.py wide-F16.gguf -t Q3_K_M -t Q4_K_M -t Q5_K_M --write
    python tools/rounding.py wide-F16.gguf --rows 10,25,50,100

Calibrates on cnq's own Chinese and English texts, and measures on texts of other kinds: buyers' reviews, licences, and what
--text names besides. Steps run as processes of their own, whose time and peak memory are taken. What is there beside the
float model is used again. --rows: what more or less of the same text gives. --write puts the table into docs/benchmarks.md.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from cnq.convert import convert
from cnq.corpus import Source, cutter, peoples_daily, read_source
from cnq.engine.quantizer import Outcome
from cnq.evaluate import Evaluation, evaluate
from cnq.gguf_file import GgufFile
from cnq.hessian_file import beside, read_statistics
from cnq.machine import this_machine
from cnq.paired import Interval, Paired, compare
from cnq.quantize import ROUNDINGS
from cnq.report import Compensation
from cnq.report.data import ROLES
from cnq.report.plots import error_by_layer
from cnq.texts import python_reference, unlike_texts

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- rounding: begin -->", "<!-- rounding: end -->"
PLAIN, *OTHERS = ROUNDINGS
COLUMNS = (
    "bytes", "text", "KLD plain → this", "ratio [95 %]", "ratio of medians [95 %]", "same top %", "difference, points [95 %]",
    "chunks better",
)  # fmt: skip
FILE = click.Path(path_type=Path)


@dataclass(frozen=True)
class Ran:
    """A step in a process of its own. said: its JSON. cpu: seconds of all its cores together, which other work on the machine
    hardly changes. memory: peak of the process and of those it started, bytes."""

    said: Any
    seconds: float
    cpu: float
    memory: int


@click.command()
@click.argument("gguf", type=FILE)
@click.option("-t", "--type", "types", multiple=True, default=["Q4_K_M"], show_default=True)
@click.option("--chunks", "n_chunks", default=100, show_default=True, help="Of 512 tokens, for calibration.")
@click.option("--eval-chunks", default=24, show_default=True, help="Of 512 tokens of each text measured on.")
@click.option("--text", "texts", multiple=True, metavar="NAME=FILE", help="Measure on this too; repeatable.")
@click.option("--rows", help="Numbers of chunks, comma-separated: study how many rows it takes, and do nothing else.")
@click.option("--weights", is_flag=True, help="Measure the weights alone too, decoded to float16.")
@click.option("--picture", type=FILE, help="Draw the error by layer of the first type into this SVG.")
@click.option("--threads", default=0, help="0 = all cores.")
@click.option("--write", is_flag=True, help="Put the table into docs/benchmarks.md.")
def main(
    gguf: Path, types: tuple[str, ...], n_chunks: int, eval_chunks: int, texts: tuple[str, ...], rows: str | None,
    weights: bool, picture: Path | None, threads: int, write: bool,
) -> None:  # fmt: skip
    """Compare on the float GGUF."""
    if rows:
        click.echo("\n".join(rows_needed(gguf, types[0], [int(n) for n in rows.split(",")], threads)))
        return
    imatrix = gguf.with_name(f"{gguf.stem}.imatrix.gguf")
    stages = {"second moments": once(imatrix, lambda: calibrated(gguf, imatrix, n_chunks, threads))}
    files: dict[tuple[str, str], Path] = {}
    for type in types:
        for rounding in ROUNDINGS:
            path = files[type, rounding] = gguf.with_name(f"{gguf.stem}-{type}-{rounding}.gguf")
            stages[f"{type}, {rounding}"] = once(path, partial(rounded, gguf, path, type, imatrix, rounding, threads))
            if weights:
                decoded = files[f"{type}, weights alone", rounding] = path.with_name(f"{path.stem}-decoded.gguf")
                convert(path, decoded, dtype="f16", force=True)
    named = [(text.partition("=")[0], read_source(Path(text.partition("=")[2]))) for text in texts]
    sources = [(s.name, s) for s in unlike_texts()] + named
    sources.append(("newspaper held out, as in calibration", peoples_daily("held-out")))
    sources.append(("Python reference held out, as in calibration", python_reference("held-out")))
    lines = [header(), "", *table(gguf, files, sources, eval_chunks, threads), ""]
    lines += [f"- {t}, {r}: {kept(stages[f'{t}, {r}'].said)}" for t in types for r in OTHERS]
    lines += ["", *times(stages)]
    click.echo("\n".join(lines))
    if picture:
        draw(stages[f"{types[0]}, compensated"].said, picture)
    if write:
        put_into_page(lines, BEGIN, END)


def put_into_page(lines: list[str], begin: str, end: str) -> None:
    """Between two marks of docs/benchmarks.md; at its end where they are not there yet."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    body = "\n".join(lines).rstrip()
    PAGE.write_text(f"{before.rstrip()}\n\n{begin}\n{body}\n{end}{rest.partition(end)[2] or chr(10)}", encoding="utf-8")


def once(path: Path, make: Callable[[], Ran]) -> Ran:
    """What making a file took; from its record, when it was made before."""
    record = path.with_name(f"{path.name}.ran.json")
    if not path.exists() or not record.exists():
        record.write_text(json.dumps(asdict(make())))
    return Ran(**json.loads(record.read_text()))


def cnq(*arguments: object, threads: int = 0) -> Ran:
    """Run a command of cnq to its end."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "cnq", *map(str, arguments), "--threads", str(threads), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return Ran(json.loads(said), time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def calibrated(gguf: Path, dst: Path, n_chunks: int, threads: int) -> Ran:
    return cnq("imatrix", gguf, "-o", dst, "--chunks", n_chunks, "--hessian", "--force", threads=threads)


def rounded(gguf: Path, dst: Path, type: str, imatrix: Path, rounding: str, threads: int) -> Ran:
    return cnq("quantize", gguf, dst, "-t", type, "--imatrix", imatrix, "--rounding", rounding, "--force", threads=threads)


def table(
    gguf: Path,
    files: dict[tuple[str, str], Path],
    sources: list[tuple[str, Source]],
    n_chunks: int,
    threads: int,
) -> list[str]:
    lines = [
        f"| type, rounding | {' | '.join(COLUMNS)} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, source in sources:
        found = measured(gguf, list(files.values()), source, n_chunks, threads)
        by_path = {m.path: m for m in found.models}
        for type in dict.fromkeys(type for type, _ in files):
            plain = by_path[files[type, PLAIN]]
            for rounding in OTHERS:
                mine = by_path[files[type, rounding]]
                lines.append(row(f"{type}, {rounding}", mine.path, name, compare(plain, mine, found.n_chunks)))
    for (type, _), path in files.items():
        one, two = GgufFile(files[type, PLAIN]), GgufFile(path)
        alike = all((one.tensors[n].type, one.tensors[n].nbytes) == (t.type, t.nbytes) for n, t in two.tensors.items())
        assert alike, f"{path} has other types than plain rounding"
    return lines


def kept(said: dict[str, Any]) -> str:
    tried = said["compensation"]
    plain = [o["name"].removesuffix(".weight") for o in tried if not o["kept"]]
    return f"{len(tried) - len(plain)} of {len(tried)} matrices compensated" + (f"; plain: {', '.join(plain)}" if plain else "")


def measured(gguf: Path, files: list[Path], source: Source, n_chunks: int, threads: int) -> Evaluation:
    return evaluate(files, cutter([source], 512, n_chunks), base=gguf, threads=threads)


def row(type: str, path: Path, name: str, p: Paired) -> str:
    def interval(i: Interval, form: str) -> str:
        return f"{i.value:{form}} [{i.low:{form}}, {i.high:{form}}]"

    ratio = f"**{p.kld.value:.3f}** [{p.kld.low:.3f}, {p.kld.high:.3f}]"
    cells = (
        type, f"{path.stat().st_size:,}", name, f"{p.plain:.6f} → {p.mine:.6f}", ratio, interval(p.median, ".3f"),
        f"{p.top_plain:.2f} → {p.top_mine:.2f}", interval(p.top, "+.2f"), f"{p.better}/{p.n_chunks}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def draw(said: dict[str, Any], path: Path) -> None:
    """The report's picture as a file of its own, with the colours of the light page."""
    outcomes = tuple(Outcome(**o) for o in said["compensation"])
    losses = Compensation(Path(said["path"]), outcomes, ()).losses()
    svg = error_by_layer({role: losses[role] for role in ROLES if role in losses}, "error by layer, plain and compensated")
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace("currentColor", "#70767d")
    path.write_text(svg.replace("var(--accent)", "#1f7a8c") + "\n", encoding="utf-8")


def times(stages: dict[str, Ran]) -> list[str]:
    rows = [f"| {name} | {r.seconds:.0f} | {r.cpu:.0f} | {r.memory / 1e9:.2f} |" for name, r in stages.items()]
    return ["| stage | seconds | of processor time | peak memory, GB |", "|---|---|---|---|", *rows]


def rows_needed(gguf: Path, type: str, counts: list[int], threads: int) -> list[str]:
    """Error at the output, compensated / plain, by role, for statistics of so many chunks; geometric means over the layers.

    Judged on the held-out half of the calibration texts.
    """
    judge = gguf.with_name(f"{gguf.stem}-judge.imatrix.gguf")
    if not judge.exists():
        texts = []
        for name, source, share in (("zh", peoples_daily("held-out"), 3), ("en", python_reference("held-out"), 2)):
            file = gguf.with_name(f"held-out-{name}.txt")
            file.write_text("\n".join(source.documents), encoding="utf-8")
            texts.append(f"{file}={share}")
        cnq("imatrix", gguf, *texts, "-o", judge, "--chunks", 40, "--hessian", "--force", threads=threads)
    lines: list[str] = []
    for n in sorted(counts):
        imatrix = gguf.with_name(f"{gguf.stem}-rows-{n}.imatrix.gguf")
        if not imatrix.exists():
            calibrated(gguf, imatrix, n, threads)
        out = gguf.with_name(f"{gguf.stem}-rows.gguf")
        pair = []
        for rounding in (PLAIN, "compensated"):
            rounded(gguf, out, type, imatrix, rounding, threads)
            pair.append(losses(gguf, out, judge))
        out.unlink()
        logs: dict[str, list[float]] = {}
        for name in pair[0]:
            if pair[0][name] > 0:
                logs.setdefault(name.split(".")[-2], []).append(float(np.log(pair[1][name] / pair[0][name])))
        if not lines:
            lines = [f"| chunks | rows to fit to | {' | '.join(logs)} |", f"|---|---|{'---|' * len(logs)}"]
        n_fit = read_statistics(beside(imatrix)).inputs[0].n_fit
        lines.append(f"| {n} | {n_fit:,} | {' | '.join(f'{np.exp(np.mean(found)):.3f}' for found in logs.values())} |")
    return lines


def losses(gguf: Path, other: Path, imatrix: Path) -> dict[str, float]:
    """Mean square of the error at each matrix's output over the inputs that an importance matrix's second moments are of."""
    statistics, exact, file = read_statistics(beside(imatrix)), GgufFile(gguf), GgufFile(other)
    found = {}
    for number, one in enumerate(statistics.inputs):
        sums = statistics.read(number)
        for name in one.weights:
            error = exact.tensor(name).float32() - file.tensor(name).float32()
            found[name] = float(np.einsum("ij,ij->", error @ sums.fit, error, dtype=np.float64)) / sums.n_fit
    return found


def header() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    command = " ".join(["python", f"tools/{Path(sys.argv[0]).name}", *(Path(a).name if "/" in a else a for a in sys.argv[1:])])
    machine = f"{os.cpu_count()} cores, {this_machine().cpu}"
    return f"`{command}` at {commit}, llama-cpp-python {version('llama-cpp-python')}, {machine}."


if __name__ == "__main__":
    main()

"""Time cnq against llama.cpp's own tools, built from the same source, on the same files, in turns (`make bench`).

    python tools/bench.py [MODEL] [--runs N] [--write]

MODEL is what `cnq build` takes. Each pair of runs gives a ratio cnq / llama.cpp; the table shows the median with the smallest
and the largest. Whole processes are timed, start-up included. --write puts the table into docs/benchmarks.md, in the place of
the model's last one.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import reference

from cnq import catalog
from cnq.corpus import peoples_daily
from cnq.gguf_file import GgufFile
from cnq.imatrix_file import read_imatrix
from cnq.machine import this_machine
from cnq.speed import measure_speed

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
IMATRIX_CHUNKS, PPL_CHUNKS = 20, 10  # of 512 tokens
BEGIN, END = "<!-- bench of {}: begin -->", "<!-- bench of {}: end -->"


@dataclass(frozen=True)
class Row:
    """ratios: cnq / llama.cpp, one for each pair. seconds: medians of (cnq, llama.cpp). check: what was compared."""

    step: str
    reference: str
    goal: float
    ratios: list[float]
    seconds: tuple[float, float]
    check: str


def timed(command: list[str], env: dict[str, str] | None = None, said: Path | None = None) -> float:
    """Seconds of a whole process; what it prints goes to `said`."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    if said:
        said.write_text(done.stdout, encoding="utf-8")
    return seconds


def paired(
    ours: list[str], theirs: list[str], runs: int, env: dict[str, str], said: Path | None = None
) -> tuple[list[float], tuple[float, float]]:
    """(ratios, (our median, their median)), in turns after one run of each that does not count."""
    timed(ours, None, said), timed(theirs, env, said and said.with_suffix(".theirs"))
    pairs = [(timed(ours), timed(theirs, env)) for _ in range(runs)]
    medians = statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
    return [a / b for a, b in pairs], medians


def same_tensors(a: Path, b: Path) -> str:
    one, two = GgufFile(a), GgufFile(b)
    if a.read_bytes() == b.read_bytes():
        return "same file, byte for byte"
    names = one.tensors.keys() | two.tensors.keys()
    unlike = [n for n in names if n not in one.tensors or n not in two.tensors or not same(one.tensor(n), two.tensor(n))]
    return f"{len(unlike)} tensors differ: {unlike[:3]}" if unlike else "same tensors; keys as listed in tests/golden"


def same(a: object, b: object) -> bool:
    return (a.type, a.shape, a.data.tobytes()) == (b.type, b.shape, b.data.tobytes())  # type: ignore[attr-defined]


def bench(model: str, runs: int) -> list[Row]:
    binaries, source = reference.tools(), reference.source()
    cnq = [sys.executable, "-m", "cnq"]
    work = reference.CACHE / "work"
    work.mkdir(exist_ok=True)
    built = ROOT / "models" / catalog.find(model).name
    subprocess.run([*cnq, "build", model, "--out", str(built), "--chunks", "0", "--eval-chunks", "0"], check=True)
    checkpoint = next(p for p in (built / "hf", built / "source", Path(model)) if p.is_dir())
    (f16,) = built.glob("*-F16.gguf")
    env = {"PYTHONPATH": str(source / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    mine, its = work / "cnq.gguf", work / "llama.gguf"
    rows = []

    ours = [*cnq, "convert", str(checkpoint), str(mine), "--dtype", "f16", "--force"]
    theirs = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(checkpoint), "--outfile", str(its), "--outtype", "f16"]
    ratios, seconds = paired(ours, theirs, runs, env)
    rows.append(Row("convert to F16", "convert_hf_to_gguf.py", 0.25, ratios, seconds, same_tensors(mine, its)))

    text = work / "text.txt"
    text.write_text("\n".join(peoples_daily("held-out").documents)[:400_000], encoding="utf-8")
    im, its_im = work / "cnq.imatrix.gguf", work / "llama.imatrix.gguf"
    chunks = ["--chunks", str(IMATRIX_CHUNKS)]
    ours = [*cnq, "imatrix", str(f16), str(text), "-o", str(im), *chunks, "--force"]
    theirs = [str(binaries / "llama-imatrix"), "-m", str(f16), "-f", str(text), "-o", str(its_im), *chunks, "--no-ppl"]
    ratios, seconds = paired(ours, theirs, runs, {})
    rows.append(
        Row(f"imatrix, {IMATRIX_CHUNKS} chunks", "llama-imatrix --no-ppl", 0.90, ratios, seconds, same_sums(im, its_im))
    )

    for type in ("Q4_K_M", "Q8_0"):
        ours = [*cnq, "quantize", str(f16), str(mine), "-t", type, "--force"]
        theirs = [str(binaries / "llama-quantize"), str(f16), str(its), type]
        ratios, seconds = paired(ours, theirs, runs, {})
        rows.append(Row(f"quantize to {type}", "llama-quantize", 1.02, ratios, seconds, same_tensors(mine, its)))

    quantized, base, said = work / "q4.gguf", work / "base.kld", work / "evaluation.json"
    subprocess.run([*cnq, "quantize", str(f16), str(quantized), "-t", "Q4_K_M", "--force"], check=True)
    chunks = ["--chunks", str(PPL_CHUNKS)]
    ours = [*cnq, "evaluate", str(quantized), "--against", str(f16), "--text", str(text), *chunks, "--json"]
    tool = f"{binaries / 'llama-perplexity'} --kl-divergence-base {base}"
    theirs = ["sh", "-c", f"{tool} -m {f16} -f {text} {' '.join(chunks)} && {tool} -m {quantized} --kl-divergence"]
    ratios, seconds = paired(ours, theirs, runs, {}, said)
    check = same_figures(said, said.with_suffix(".theirs"))
    rows.append(Row(f"PPL and KLD, {PPL_CHUNKS} chunks", "llama-perplexity, twice", 0.85, ratios, seconds, check))
    return rows + speeds(quantized, binaries / "llama-bench", runs)


def speeds(gguf: Path, llama_bench: Path, runs: int) -> list[Row]:
    """Seconds a token, ours / theirs, of a prompt of 512 tokens and of 32 single ones."""
    cores = measure_speed(gguf).threads
    pairs = []
    for _ in range(runs):
        ours = measure_speed(gguf)
        command = [str(llama_bench), "-m", str(gguf), "-p", "512", "-n", "32", "-t", str(cores), "-r", "1", "-o", "json"]
        tests = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        theirs = {"prefill" if t["n_prompt"] else "decode": t["avg_ts"] for t in tests}
        pairs.append((ours, theirs))
    rows = []
    for step in ("prefill", "decode"):
        both = [(1 / getattr(ours, step), 1 / theirs[step]) for ours, theirs in pairs]
        medians = statistics.median(a for a, _ in both), statistics.median(b for _, b in both)
        check = f"{1 / medians[0]:.0f} / {1 / medians[1]:.0f} tok/s"
        rows.append(Row(f"{step}, Q4_K_M", "llama-bench", 1 / 0.97, [a / b for a, b in both], medians, check))
    return rows


def same_sums(a: Path, b: Path) -> str:
    one, two = read_imatrix(a), read_imatrix(b)
    worst = max(float(np.max(np.abs(one.sums[n] - s) / np.maximum(np.abs(s), 1e-30))) for n, s in two.sums.items())
    counts = all(np.array_equal(one.counts[n], c) for n, c in two.counts.items())
    return f"sums within {worst:.0e}, counts {'equal' if counts and one.sums.keys() == two.sums.keys() else 'DIFFER'}"


def same_figures(ours: Path, theirs: Path) -> str:
    found = json.loads(ours.read_text())["models"][0]
    printed = theirs.read_text()
    ppl, kld = (float(re.search(p, printed)[1]) for p in (r"Mean PPL\(Q\) +: +(\S+)", r"Mean +KLD: +(\S+)"))  # type: ignore[index]
    return f"PPL {found['ppl']['value']:.4f} / {ppl:.4f}, KLD {found['against']['kld']['value']:.6f} / {kld:.6f}"


def table(model: str, rows: list[Row], runs: int) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = [
        f"`python tools/bench.py {model} --runs {runs}` at {commit}, llama-cpp-python {version('llama-cpp-python')}, "
        f"{os.cpu_count()} cores, {this_machine().cpu}.",
        "",
        "| step | against | ratio: median (least – most) | goal | median seconds, cnq / llama.cpp | outputs |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        spread = f"**{statistics.median(r.ratios):.2f}** ({min(r.ratios):.2f} – {max(r.ratios):.2f})"
        lines.append(
            f"| {r.step} | {r.reference} | {spread} | ≤ {r.goal:.2f} | {r.seconds[0]:.3g} / {r.seconds[1]:.3g} | {r.check} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    text = table(options.model, bench(options.model, options.runs), options.runs)
    print(text)
    if options.write:
        begin, end = (mark.format(catalog.find(options.model).name) for mark in (BEGIN, END))
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
        PAGE.write_text(f"{before.rstrip()}\n\n{begin}\n{text}\n{end}{rest.partition(end)[2] or chr(10)}", encoding="utf-8")


if __name__ == "__main__":
    main()

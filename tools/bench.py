"""Time cnq against llama.cpp's own tools, built from the same source, on the same files, in turns (`make bench`).

    python tools/bench.py [MODEL] [--runs N] [--write]

MODEL is what `cnq build` takes. Each pair of runs gives a ratio cnq / llama.cpp; the table shows the median with the smallest
and the largest. Whole processes are timed, start-up included. --write puts the table into docs/benchmarks.md.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import reference

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


@dataclass(frozen=True)
class Row:
    """ratios: cnq / llama.cpp, one for each pair. seconds: medians of (cnq, llama.cpp). check: what was compared."""

    step: str
    reference: str
    goal: float
    ratios: list[float]
    seconds: tuple[float, float]
    check: str


def timed(command: list[str], env: dict[str, str] | None = None) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return seconds


def paired(ours: list[str], theirs: list[str], runs: int, env: dict[str, str]) -> tuple[list[float], tuple[float, float]]:
    """(ratios, (our median, their median)), in turns after one run of each that does not count."""
    timed(ours), timed(theirs, env)
    pairs = [(timed(ours), timed(theirs, env)) for _ in range(runs)]
    medians = statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
    return [a / b for a, b in pairs], medians


def same_tensors(a: Path, b: Path) -> str:
    from cnq.gguf_file import GgufFile

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
    built = ROOT / "models" / model
    subprocess.run([*cnq, "build", model, "--out", str(built)], check=True)
    checkpoint = built / "hf" if (built / "hf").is_dir() else built / "source"
    (f16,) = built.glob("*-F16.gguf")
    env = {"PYTHONPATH": str(source / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    mine, its = work / "cnq.gguf", work / "llama.gguf"
    rows = []

    ours = [*cnq, "convert", str(checkpoint), str(mine), "--dtype", "f16", "--force"]
    theirs = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(checkpoint), "--outfile", str(its), "--outtype", "f16"]
    ratios, seconds = paired(ours, theirs, runs, env)
    rows.append(Row("convert to F16", "convert_hf_to_gguf.py", 0.25, ratios, seconds, same_tensors(mine, its)))

    for type in ("Q4_K_M", "Q8_0"):
        ours = [*cnq, "quantize", str(f16), str(mine), "-t", type, "--force"]
        theirs = [str(binaries / "llama-quantize"), str(f16), str(its), type]
        ratios, seconds = paired(ours, theirs, runs, {})
        rows.append(Row(f"quantize to {type}", "llama-quantize", 1.02, ratios, seconds, same_tensors(mine, its)))
    return rows


def table(model: str, rows: list[Row], runs: int) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = [
        f"`python tools/bench.py {model} --runs {runs}` at {commit}, llama-cpp-python {version('llama-cpp-python')}, "
        f"{os.cpu_count()} cores, {_cpu()}.",
        "",
        "| step | against | ratio: median (least – most) | goal | median seconds, cnq / llama.cpp | outputs |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        spread = f"**{statistics.median(r.ratios):.2f}** ({min(r.ratios):.2f} – {max(r.ratios):.2f})"
        lines.append(
            f"| {r.step} | {r.reference} | {spread} | ≤ {r.goal:.2f} | {r.seconds[0]:.2f} / {r.seconds[1]:.2f} | {r.check} |"
        )
    return "\n".join(lines)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    text = table(options.model, bench(options.model, options.runs), options.runs)
    print(text)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()

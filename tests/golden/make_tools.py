"""Rewrite tests/golden/tools.json from llama-imatrix and llama-perplexity (`make golden`), built from the pinned sdist.

Run on a tiny model and text made here, so that the tests need neither tool.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "tools")]

import reference  # noqa: E402
import tiny  # noqa: E402

from cnq.convert import convert  # noqa: E402
from cnq.imatrix_file import read_imatrix  # noqa: E402
from cnq.quantize import quantize  # noqa: E402

N_CTX, CHUNKS = 64, 6
PRINTED = {
    "ppl": r"Mean PPL\(Q\) +: +(\S+) ± +(\S+)",
    "ppl_base": r"Mean PPL\(base\) +: +(\S+) ± +(\S+)",
    "ratio": r"Mean PPL\(Q\)/PPL\(base\) +: +(\S+) ± +(\S+)",
    "kld": r"Mean +KLD: +(\S+) ± +(\S+)",
    "kld_99": r"99.0% +KLD: +(\S+)()",
    "kld_median": r"Median +KLD: +(\S+)()",
    "dp_rms": r"RMS Δp +: +(\S+) ± +(\S+)",
    "same_top": r"Same top p: +(\S+) ± +(\S+)",
}


def text() -> str:
    return "\n".join(tiny.SENTENCES * 12)


def models(folder: Path) -> tuple[Path, Path]:
    """(F16, Q4_0) of the tiny model that the figures are of."""
    f16 = convert(tiny.checkpoint(folder / "hf"), folder / "f16.gguf").path
    return f16, quantize(f16, folder / "q4_0.gguf", "Q4_0").path


def main() -> None:
    tools = reference.tools()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        f16, q4 = models(folder)
        (folder / "text.txt").write_text(text() + "\n", encoding="utf-8")
        common = ["-f", str(folder / "text.txt"), "-c", str(N_CTX), "-b", str(N_CTX), "--chunks", str(CHUNKS)]

        def run(tool: str, *arguments: object) -> str:
            command = [str(tools / tool), *map(str, arguments)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        run("llama-imatrix", "-m", f16, "-o", folder / "im.gguf", "--no-ppl", *common)
        importance = read_imatrix(folder / "im.gguf")
        run("llama-perplexity", "-m", f16, "--kl-divergence-base", folder / "base.kld", *common)
        printed = run("llama-perplexity", "-m", q4, "--kl-divergence-base", folder / "base.kld", "--kl-divergence", *common)
    golden = {
        "llama_cpp_python": version("llama-cpp-python"),
        "imatrix": {
            name: {"counts": importance.counts[name].tolist(), "sums": [float(f"{x:.8g}") for x in sums.ravel().tolist()]}
            for name, sums in importance.sums.items()
        },
        "perplexity": {
            key: [float(x) for x in match.groups() if x]
            for key, pattern in PRINTED.items()
            if (match := re.search(pattern, printed))
        },
    }
    (HERE / "tools.json").write_text(json.dumps(golden) + "\n")
    print(golden["perplexity"])


if __name__ == "__main__":
    main()

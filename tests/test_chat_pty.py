"""`cnq chat` as a person uses it: in a pseudo-terminal, with keys, pastes and Ctrl-C."""

import json
import os
import sys
import time

import pytest

if sys.platform == "win32":
    pytest.skip("no pseudo-terminals", allow_module_level=True)

from pseudo_terminal import PseudoTerminal

PROMPT = r"\d+/\d+ [▓░]+ \d+ %(?: · [\d.]+ tok/s)?\s*$"  # the toolbar, which is drawn last

WRITING = r"%(?: · [\d.]+ tok/s)? · Ctrl-C stops"  # and not reading the prompt any more


@pytest.fixture
def start(gguf, tmp_path):
    """start(*arguments, **environment) -> a chat in a terminal, at its first prompt. Answers are long: 16000 tokens."""
    path = gguf(vocab="spm-added", max_position_embeddings=1 << 15)
    open_ones = []

    def start(*arguments, prompt=PROMPT, **environment):
        argv = (sys.executable, "-m", "cnq", "chat", path, "--temperature", "0", "--ctx", "16384", *arguments)
        home = {"XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        terminal = PseudoTerminal(*argv, **home | environment)
        open_ones.append(terminal)
        terminal.wait(prompt)
        return terminal

    yield start
    for terminal in open_ones:
        terminal.__exit__()


def messages(file):
    return json.loads(file.read_text(encoding="utf-8"))["messages"]


def test_a_conversation(start, tmp_path):
    file = tmp_path / "talk.json"
    chat = start("--session", file, "--max-tokens", "12")
    chat.send("你好，世界\r")
    chat.wait("stopped at max_tokens=12")
    chat.wait(PROMPT)
    chat.send("\x1b[200~第一行\r\n第二行\r\n第三行\x1b[201~")
    chat.wait("第三行")
    chat.send("\r")
    chat.wait("stopped at max_tokens=12")
    chat.wait(PROMPT)
    assert [m["content"] for m in messages(file) if m["role"] == "user"] == ["你好，世界", "第一行\n第二行\n第三行"]
    answer = messages(file)[-1]["content"]
    chat.send("/undo\r")
    chat.wait("taken back: 第一行")
    chat.wait(PROMPT)
    assert len(messages(file)) == 2
    chat.send("一\\\r二\x1b\r三\r")  # a backslash and Enter, Alt-Enter
    chat.wait("stopped at max_tokens=12")
    chat.wait(PROMPT)
    assert messages(file)[-2]["content"] == "一\n二\n三"
    again = messages(file)[-1]["content"]
    chat.send("/regen\r")
    chat.wait("stopped at max_tokens=12")
    chat.wait(PROMPT)
    assert messages(file)[-1]["content"] == again != answer
    chat.send("/rest\r")
    chat.wait("the nearest is /reset")
    chat.send("/exit\r")
    assert chat.end() == 0
    chat.raw.decode()  # no character was written by halves
    assert not file.with_name("talk.json.lock").exists()


def test_ctrl_c_stops_the_answer_and_not_the_program(start, tmp_path):
    file = tmp_path / "talk.json"
    chat = start("--session", file, "--max-tokens", "16000")
    chat.send("量化\r")
    chat.wait(WRITING)
    time.sleep(0.5)
    chat.send("\x03")
    chat.wait("stopped\\.", 5)
    chat.wait(PROMPT)
    assert [m["role"] for m in messages(file)] == ["user", "assistant"] and messages(file)[1]["content"]
    chat.send("写了一半")
    chat.wait("写了一半")
    chat.send("\x03")  # clears the line
    chat.send("\x03")
    chat.wait("Ctrl-D or /exit leaves")
    chat.wait(PROMPT)
    chat.send("\x04")
    assert chat.end() == 0
    assert len(messages(file)) == 2


def test_what_is_typed_and_pasted_meanwhile_is_the_next_question(start, tmp_path):
    file = tmp_path / "talk.json"
    chat = start("--session", file, "--max-tokens", "3000")
    chat.send("量化\r")
    chat.wait(WRITING)
    chat.send("\x1b[200~床前\r明月光\x1b[201~")
    time.sleep(0.3)
    assert "明月光" not in chat.text, "it is not shown within the answer"
    chat.send("\x1b[200~，\x1b[201~\x03")
    chat.wait("明月光，")
    chat.send("\r")
    chat.wait("Ctrl-C stops")  # while it reads or writes: a model of random numbers may end its answer at once
    time.sleep(0.3)
    chat.send("\x03")
    chat.wait(PROMPT)
    chat.send("\x04")
    assert chat.end() == 0
    assert messages(file)[2]["content"] == "床前\n明月光，"


def test_a_paste_of_a_megabyte_is_named_and_refused_with_its_size(start):
    chat = start()
    chat.send("总结\x1b[200~" + "床前明月光，疑是地上霜。\r" * 28000 + "\x1b[201~")
    chat.wait(r"\[pasted text 1: 364000 characters in 28000 lines\]")
    chat.send("\r")
    chat.wait(r"the question is \d+ bytes, at least \d+ tokens, the context 16384")
    chat.wait(PROMPT)
    chat.send("/exit\r")
    assert chat.end() == 0


def test_a_window_that_changes_its_size_meanwhile(start):
    chat = start("--max-tokens", "4000")
    chat.send("量化\r")
    chat.wait(WRITING)
    for columns, rows in ((40, 10), (20, 4), (120, 40), (80, 24)):
        chat.resize(columns, rows)
        time.sleep(0.15)
    chat.send("\x03")
    chat.wait("stopped\\.")
    chat.wait(PROMPT)
    chat.resize(50, 12)
    chat.send("/exit\r")
    assert chat.end() == 0


def test_a_terminal_that_cannot_move_its_cursor(start):
    chat = start("--max-tokens", "5", TERM="dumb", prompt=">>>")
    chat.send("你好\r")
    chat.wait("stopped at max_tokens=5")
    chat.send("/help\r")
    chat.wait(r"leave\s+>>> ?$")
    chat.send("\x04")
    assert chat.end() == 0
    assert b"\x1b" not in chat.raw


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written(start, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    chat = start("--max-tokens", "5", XDG_STATE_HOME=str(tmp_path / "locked"))
    assert "questions are not remembered" in chat.text


def test_a_history_in_the_way_of_a_file(start, tmp_path):
    (tmp_path / "file").write_text("")
    chat = start("--max-tokens", "5", XDG_STATE_HOME=str(tmp_path / "file"))
    assert "questions are not remembered" in chat.text
    chat.send("你好\r")
    chat.wait("stopped at max_tokens=5")


def test_a_session_goes_on_where_it_was(start, tmp_path):
    file = tmp_path / "talk.json"
    first = start("--session", file, "--max-tokens", "5")
    first.send("你好\r")
    first.wait("stopped at")
    first.wait(PROMPT)
    first.send("\x04")
    assert first.end() == 0
    second = start("--session", file)
    assert "talk.jsongoeson;itslastquestionandanswer:>>>你好" in "".join(second.text.split())
    second.send("/stats\r")
    second.wait(r"turns     1")
    second.send("\x04")
    assert second.end() == 0
    third = start(prompt="open in another|" + PROMPT)
    third.send("/load " + str(file) + "\r")
    third.wait("2 messages from")

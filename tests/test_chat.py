"""Streaming: whole characters, stop texts held back, a conversation through the command line."""

import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cnq.chat import Chat, characters, converse, open_chat, style_of, until
from cnq.cli import cli
from cnq.engine.model import Model, Sampling
from cnq.errors import EngineError

TEXT = "量化😀，é 한 a\n👨‍👩‍👧"


@given(st.text(max_size=30), st.randoms(use_true_random=False))
def test_bytes_cut_anywhere_become_whole_characters(text, random):
    raw = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
    cuts = sorted(random.sample(range(len(raw) + 1), min(len(raw), 5)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    out = list(characters(pieces))
    assert "".join(out) == raw.decode()
    assert all(piece.encode().decode() == piece for piece in out)


def test_a_character_appears_as_soon_as_it_is_whole_and_not_before():
    seen = []
    for byte in characters(bytes([b]) for b in "量a".encode()):
        seen.append(byte)
    assert seen == ["量", "a"]


def test_bytes_that_are_no_text_do_not_hang_the_stream():
    assert "".join(characters([b"\xff", b"a", b"\xe9\x87"])) == "�a�"


@given(st.text("ab#I ", max_size=30), st.integers(1, 5))
def test_nothing_of_a_stop_text_is_shown(text, width):
    stops = ("##I", "ab")
    cut = min((text.find(s) for s in stops if s in text), default=len(text))
    pieces = [text[i : i + width] for i in range(0, len(text), width)]
    assert "".join(until(stops, pieces)) == text[:cut]


def test_text_that_cannot_become_a_stop_is_not_held_back():
    assert next(until(("<|im_end|>",), iter(["你好", "…"]))) == "你好"


def test_a_conversation_grows_and_the_prefix_is_not_computed_again(gguf):
    path = gguf(vocab="spm-added")
    with Model(path, n_ctx=512) as model:
        chat = Chat(model, style_of(model.fields, path, None))
        first = "".join(chat.ask("你好", 8, 0.0))
        seen = len(model._seen)
        assert chat.messages == [{"role": "user", "content": "你好"}, {"role": "assistant", "content": first.rstrip()}]
        kept = []
        forget = model._forget
        model._forget = lambda keep: (kept.append(keep), forget(keep))
        list(chat.ask("再来", 8, 0.0))
        assert 0 < kept[0] <= seen


def test_greedy_answers_do_not_depend_on_what_is_cached(gguf):
    path = gguf(vocab="spm-added")
    prompt = list(range(3, 40))
    with Model(path, n_ctx=512) as model:
        fresh = list(model.generate(prompt, Sampling(temperature=0), 10))
        again = list(model.generate(prompt, Sampling(temperature=0), 10))
    with Model(path, n_ctx=512, n_batch=16) as model:
        assert fresh == again == list(model.generate(prompt, Sampling(temperature=0), 10))


def test_generation_ends_when_the_context_is_full(gguf):
    with Model(gguf(), n_ctx=256) as model:
        n = model.n_ctx
        assert len(list(model.generate([5] * (n - 4), Sampling(temperature=0), 100))) <= 4
        with pytest.raises(EngineError, match="--ctx"):
            list(model.generate([5] * n, Sampling(), 1))
        with pytest.raises(EngineError):
            list(model.generate([], Sampling(), 1))


def test_ctrl_c_breaks_off_an_answer_and_the_conversation_goes_on(gguf):
    path = gguf(vocab="spm-added")
    shown = []
    questions = iter(["一", "二"])

    def ask():
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    def show(pieces):
        shown.append(next(pieces, ""))
        if len(shown) == 1:
            raise KeyboardInterrupt

    with open_chat(path) as chat:
        converse(chat, ask, show, 8, 0.0)
        assert len(shown) == 2
        assert [m["role"] for m in chat.messages][:3] == ["user", "assistant", "user"]


def test_one_answer_on_the_command_line(gguf):
    path = gguf(vocab="spm-added")
    arguments = ["chat", str(path), "--prompt", "你好", "--max-tokens", "5", "--temperature", "0"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert answer["prompt"] == "你好"
    assert result.output.rstrip("\n") == answer["answer"].rstrip("\n")


def test_questions_from_a_pipe(gguf):
    result = CliRunner().invoke(cli, ["chat", str(gguf(vocab="spm-added")), "--max-tokens", "3"], input="你好\n\n再见\n")
    assert result.exit_code == 0, result.output

"""Streaming: whole characters, stop texts held back, a conversation through the command line."""

import json
import shutil
import threading
import time

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cnq.chat import characters, converse, open_chat, prompt_tokens, until
from cnq.cli import cli
from cnq.convert import convert
from cnq.engine.model import Model, Sampling
from cnq.errors import EngineError, PromptError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """What the user keeps is not touched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


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
    assert "".join(characters([b"\xff", b"a", b"\xe9\x87", b"b"])) == "�a�b"


def test_a_character_that_the_limit_of_tokens_cut_is_left_out():
    assert "".join(characters(["量".encode(), "化".encode()[:2]])) == "量"


@given(st.text("ab#I ", max_size=30), st.integers(1, 5))
def test_nothing_of_a_stop_text_is_shown(text, width):
    stops = ("##I", "ab")
    cut = min((text.find(s) for s in stops if s in text), default=len(text))
    pieces = [text[i : i + width] for i in range(0, len(text), width)]
    assert "".join(until(stops, pieces)) == text[:cut]


def test_a_prompt_does_not_end_with_the_eos_of_its_tokenizer(gguf, tmp_path):
    checkpoint = shutil.copytree(gguf().parent / "hf", tmp_path / "hf")
    config = checkpoint / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_eos_token": True}))
    with open_chat(convert(checkpoint, tmp_path / "eos.gguf").path, format="alpaca", n_ctx=256) as chat:
        model = chat.model
        assert model.tokenize("你好", add_special=True, parse_special=False)[-1] == 2  # </s>
        asked = prompt_tokens(model, chat.style, [{"role": "user", "content": "你好"}])
        assert asked[0] == 1 and 2 not in asked
        assert model.prompt("</s>", parse_special=True) == [1, 2]  # its own stays


def test_text_that_cannot_become_a_stop_is_not_held_back():
    assert next(until(("<|im_end|>",), iter(["你好", "…"]))) == "你好"


def test_a_conversation_grows_and_the_prefix_is_not_computed_again(gguf):
    path = gguf(vocab="spm-added")
    with open_chat(path, max_tokens=8, temperature=0) as chat:
        model = chat.model
        first = "".join(chat.ask("你好"))
        seen = len(model._seen)
        assert chat.messages == [{"role": "user", "content": "你好"}, {"role": "assistant", "content": first.rstrip()}]
        kept = []
        forget = model._forget
        model._forget = lambda keep: (kept.append(keep), forget(keep))
        list(chat.ask("再来"))
        assert 0 < kept[0] <= seen
        assert chat.last.n_read == chat.last.n_prompt - kept[0]


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

    with open_chat(path, max_tokens=8, temperature=0) as chat:
        converse(chat, ask, show)
        assert len(shown) == 2
        assert [m["role"] for m in chat.messages][:3] == ["user", "assistant", "user"]


def test_one_answer_on_the_command_line(gguf):
    path = gguf(vocab="spm-added")
    arguments = ["chat", str(path), "--prompt", "你好", "--max-tokens", "5", "--temperature", "0"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert answer["prompt"] == "你好"
    assert answer["how"]["ended"] == "length" and answer["how"]["n_tokens"] == 5
    assert result.output.rstrip("\n") == answer["answer"].rstrip("\n")


def test_questions_from_a_pipe(gguf, tmp_path):
    kept = tmp_path / "talk.json"
    arguments = ["chat", str(gguf(vocab="spm-added")), "--max-tokens", "3", "--session", str(kept)]
    result = CliRunner().invoke(cli, arguments, input="你好\n\n再见\n")
    assert result.exit_code == 0, result.output
    assert [m["content"] for m in json.loads(kept.read_text())["messages"] if m["role"] == "user"] == ["你好", "再见"]


@pytest.fixture(scope="module")
def small(gguf):
    """A chat with room for 256 tokens, of which an answer takes 8."""
    with open_chat(gguf(vocab="spm-added"), n_ctx=256, max_tokens=8, temperature=0, system="你是助手。") as chat:
        yield chat


@pytest.fixture
def chat(small):
    small.reset()
    small.notes.clear()
    small.max_tokens = 8
    return small


def test_the_oldest_turns_go_when_the_context_is_full(chat):
    seen = []
    prompt = chat._prompt
    chat._prompt = lambda: seen.append(prompt()) or seen[-1]
    questions = [f"第{i}问：量化把一个大模型变小" for i in range(12)]
    for question in questions:
        list(chat.ask(question))
        assert len(seen[-1]) <= 256 - 8
    del chat._prompt
    assert chat.start > 1
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == questions  # what is forgotten is still there to save
    text = b"".join(chat.model.piece(t) for t in seen[-1]).decode("utf-8", "replace").replace(" ", "")
    assert "你是助手。" in text and questions[-1] in text and questions[0] not in text
    told = [n for n in chat.notes if "forgets" in n]
    assert 0 < len(told) < 11, (
        "each time half of the context is made free: it is not told, nor computed anew, with each question"
    )
    assert "oldest turn" in told[0] and "256 tokens" in told[0]


def test_a_question_that_never_fits_changes_nothing(chat):
    list(chat.ask("你好"))
    before = list(chat.messages)
    for text, saying in (
        ("量化，" * 70, "tokens with all that goes before it, the context 256"),
        ("，" * 9999, r"29997 bytes, at least \d+ tokens"),
    ):
        with pytest.raises(PromptError, match=f"{saying}.*Shorten it"):
            list(chat.ask(text))
    assert (chat.messages, chat.start, chat.last) == (before, 1, None)
    assert list(chat.ask("再来"))


def test_how_an_answer_ended(chat):
    list(chat.ask("你好"))
    assert chat.last.ended == "length" and chat.last.n_tokens == 8
    assert 0 < chat.last.n_read <= chat.last.n_prompt and chat.last.first > 0 and chat.last.speed > 0
    chat.reset()
    chat.max_tokens = 1000
    list(chat.ask("一" * 20))
    assert chat.last.ended == "context" and chat.last.n_tokens == 256 - chat.last.n_prompt
    assert chat.notes == ["the context is full. Ask to go on: the oldest turns are forgotten then."]
    chat.reset()
    answer = chat.ask("你好")
    first = next(answer)
    answer.close()
    assert chat.last.ended == "stopped" and chat.messages[-1]["content"] == first.rstrip()


def test_undo_and_again(chat):
    first = "".join(chat.ask("一"))
    second = "".join(chat.ask("二"))
    assert "".join(chat.again()) == second
    assert chat.undo() == "二"
    assert [m["content"] for m in chat.messages] == ["你是助手。", "一", first.rstrip()]
    assert chat.undo() == "一"
    assert chat.undo() is None
    with pytest.raises(PromptError, match="no answer yet"):
        chat.again()
    assert chat.system == "你是助手。"


def test_the_system_text_can_be_changed_in_between(chat):
    list(chat.ask("一"))
    chat.system = None
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    chat.system = "说中文"
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.start == 1
    chat.system = "你是助手。"


def test_an_answer_is_stopped_from_another_thread_in_the_middle_of_a_pass(gguf):
    """One pass over 4000 tokens takes long; interrupt ends it, and the model is none the worse for it."""
    with open_chat(gguf(vocab="spm-added", max_position_embeddings=8192), n_ctx=8192, temperature=0, max_tokens=4) as chat:
        long = "量化把一个大模型变小。" * 300
        started = time.perf_counter()
        expected = list(chat.ask(long))
        whole = time.perf_counter() - started
        chat.reset()
        chat.model._forget(0)
        timer = threading.Timer(whole / 4, chat.model.interrupt)
        timer.start()
        started = time.perf_counter()
        assert list(chat.ask(long)) == []
        assert time.perf_counter() - started < 0.9 * whole
        assert chat.messages == [], "a question without any answer does not join"
        chat.model.resume()
        assert list(chat.ask(long)) == expected


def test_min_p_leaves_out_what_is_unlikely(gguf):
    """With min_p 1 only the likeliest token is left, at any temperature."""
    with Model(gguf(vocab="spm-added"), n_ctx=256) as model:
        ids = model.tokenize("你好", add_special=True, parse_special=True)
        greedy = list(model.generate(ids, Sampling(temperature=0), 12))
        assert list(model.generate(ids, Sampling(temperature=5, top_k=0, top_p=1, min_p=1), 12)) == greedy
        assert list(model.generate(ids, Sampling(temperature=5, top_k=0, top_p=1, seed=1), 12)) != greedy


def test_a_context_longer_than_trained_is_warned_of(gguf):
    with open_chat(gguf(vocab="spm-added"), n_ctx=1024) as chat:
        assert "trained with 512 tokens" in chat.notes[0]


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (("--format", "klingon"), ("unknown prompt format klingon", "alpaca")),
        (("--session", "/proc/x.json"), ("cannot be written",)),
        (("--ctx", "2000000000"), ("a context of 2000000000 tokens takes", "Try --ctx")),
        (("--json",), ("--json needs --prompt",)),
    ],
)
def test_what_cannot_be_is_refused(gguf, arguments, saying):
    result = CliRunner().invoke(cli, ["chat", str(gguf(vocab="spm-added")), *arguments], input="")
    assert result.exit_code and all(word in result.output for word in saying), result.output


@pytest.mark.parametrize("text", ["量化", "你好", "<|im_end|>", " "])
def test_a_question_of_a_megabyte_is_refused_at_once(gguf, text):
    """llama.cpp's own time grows with the square of the special tokens in a text: here it would take minutes."""
    arguments = ["chat", str(gguf(vocab="spm-added")), "--max-tokens", "2"]
    started = time.perf_counter()
    result = CliRunner().invoke(cli, arguments, input="问" + text * (1_100_000 // len(text.encode())) + "？\n")
    assert result.exit_code == 1 and "at least" in result.output and "the context 512. Shorten it" in result.output
    assert len(result.output) < 300 and time.perf_counter() - started < 10


def test_a_model_without_template_asks_for_a_format(gguf):
    result = CliRunner().invoke(cli, ["chat", str(gguf(vocab="spm")), "--prompt", "你好"])
    assert result.exit_code == 1 and "--format alpaca|" in result.output
    result = CliRunner().invoke(
        cli, ["chat", str(gguf(vocab="spm")), "--prompt", "你好", "--format", "alpaca", "--max-tokens", "2"]
    )
    assert result.exit_code == 0, result.output

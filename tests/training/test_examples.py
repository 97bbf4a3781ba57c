"""Files of conversations to examples: long ones fitted, the rest counted, kept on disk until something changes."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, runs, text_between, tokenizer

from cnq.errors import CorpusError, PromptError
from cnq.prompts import FORMATS
from cnq.records import Record
from training import examples as examples_file
from training.batches import UNLEARNED
from training.conversation import Formatter
from training.dialogues import read
from training.encoding import Encoder
from training.examples import examples
from training.fitting import Fitting


def says(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return tuple({"role": roles[turn[0]], "content": turn[2:]} for turn in turns)


def fitting(kind, name, max_length, too_long="cut"):
    return Fitting(Formatter(Encoder(tokenizer(kind)), FORMATS[name]), max_length, too_long)


def fit(kind, name, max_length, messages, too_long="cut"):
    (fitted,) = fitting(kind, name, max_length, too_long).all([Record("here", messages)])
    return fitted


def length(kind, name, *turns):
    (example,) = fit(kind, name, 10**6, says(*turns)).examples
    return len(example)


def decoded(kind, example):
    return tokenizer(kind).decode(example.input_ids, clean_up_tokenization_spaces=False)


def same(kind, name, example, *turns):
    (whole,) = fit(kind, name, 10**6, says(*turns)).examples
    return example == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-2", "chatml", "alpaca"])
def test_the_oldest_rounds_go_first_and_the_system_text_stays(kind, name):
    system, old, middle, last = "s:你是医生", ("u:第一问", "a:第一答"), ("u:第二问", "a:第二答"), ("u:第三问", "a:第三答")
    talk = says(system, *old, *middle, *last)
    for kept in ((*middle, *last), last):
        fitted = fit(kind, name, length(kind, name, system, *kept), talk)
        assert (fitted.cut, fitted.answer_cut) == (True, False)
        assert same(kind, name, fitted.examples[0], system, *kept)
    whole = fit(kind, name, length(kind, name, system, *old, *middle, *last), talk)
    assert not whole.cut
    assert same(kind, name, whole.examples[0], system, *old, *middle, *last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_long_question_loses_its_beginning_and_no_more_than_it_must(kind, name):
    question = "".join(f"{i},问" for i in range(60))
    room = length(kind, name, "s:短", "u:" + question[-120:], "a:好的。")
    fitted = fit(kind, name, room, says("s:短", "u:先问", "u:" + question, "a:好的。"))
    assert (fitted.cut, fitted.answer_cut) == (True, False)
    (example,) = fitted.examples
    assert room - 8 <= len(example) <= room
    (whole,) = fit(kind, name, 10**6, says("s:短", "u:" + question, "a:好的。")).examples
    assert [label for label in example.labels if label != UNLEARNED] == [id for id in whole.labels if id != UNLEARNED]
    assert "先问" not in decoded(kind, example)
    assert question[-100:].replace(" ", "") in decoded(kind, example).replace(" ", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_long_answer_loses_its_end(kind, name):
    question, answer = "".join(f"{i},问" for i in range(60)), "".join(f"{i};答" for i in range(200))
    overhead = length(kind, name, "s:短", "u:", "a:a")
    room = overhead + 80
    fitted = fit(kind, name, room, says("s:短", "u:" + question, "a:" + answer))
    assert (fitted.cut, fitted.answer_cut) == (True, True)
    (example,) = fitted.examples
    assert len(example) == room
    ((begin, end),) = runs([label != UNLEARNED for label in example.labels])
    assert end == room
    said = text_between(tokenizer(kind), example.input_ids, begin, end).lstrip().rstrip("\ufffd")
    assert answer.startswith(said)
    assert tokenizer(kind).eos_token_id not in example.labels
    kept = decoded(kind, example).count(",问")
    quarter = tokenizer(kind)(question[-200:], add_special_tokens=False).input_ids[-(room // 4) :]
    assert kept == pytest.approx(tokenizer(kind).decode(quarter).count(",问"), abs=1)


@pytest.mark.parametrize("name", FORMATS)
def test_where_not_even_a_token_of_the_answer_fits_the_conversation_is_dropped(name):
    talk = says("s:" + "系统" * 40, "u:问", "a:答")
    assert fit("spm-added", name, 50, talk).examples == ()
    assert fit("spm-added", name, 10**6, talk).examples != ()


def test_too_long_conversations_can_be_dropped():
    talk = says("u:问", "a:" + "答" * 50)
    n = length("qwen2", "chatml", "u:问", "a:" + "答" * 50)
    assert fit("qwen2", "chatml", n - 1, talk, "drop").examples == ()
    assert len(fit("qwen2", "chatml", n, talk, "drop").examples) == 1


def test_a_text_is_learned_whole_in_as_many_examples_as_it_needs():
    text = "量化把一个大模型变小，<s>让它在普通的电脑上运行。" * 9
    (fitted,) = fitting("spm-ours", "llama-2", 50).all([Record("here", text=text)])
    hf = tokenizer("spm-ours")
    ids = [id for example in fitted.examples for id in example.input_ids]
    assert ids == [hf.bos_token_id, *hf(text, add_special_tokens=False, split_special_tokens=True).input_ids, hf.eos_token_id]
    assert all(len(example) == 50 for example in fitted.examples[:-1])
    for example in fitted.examples:
        assert example.labels == [UNLEARNED, *example.input_ids[1:]]
    assert fitted.examples[0].nbytes > 30
    assert not fitted.cut


WORDS = st.text(st.sampled_from("a 中\n。<s>é😀"), min_size=1, max_size=60).filter(str.strip)


@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.sampled_from(["", "系统 S"]), st.integers(2, 150),
    st.sampled_from(KINDS), st.sampled_from(sorted(FORMATS)),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_whatever_the_room_an_example_fits_in_it_and_teaches_something(rounds, system, room, kind, name):
    turns = [turn for question, answer in rounds for turn in ("u:" + question, "a:" + answer)]
    talk = says(*(["s:" + system] if system else []), *turns)
    fitted = fit(kind, name, room, talk)
    for example in fitted.examples:
        assert 2 <= len(example) <= room
        assert example.labels[0] == UNLEARNED
        assert example.learned > 0
        assert len(example.labels) == len(example.input_ids) == len(example.sizes)
    (whole,) = fit(kind, name, 10**6, talk).examples
    assert fitted.cut == (len(whole) > room and bool(fitted.examples))
    assert fitted.cut or not fitted.examples or fitted.examples[0] == whole
    dropped = fit(kind, name, room, talk, "drop").examples
    assert dropped == (() if len(whole) > room else (whole,))


# Files


def alpaca(n, **more):
    return [{"instruction": f"问题{i}？", "input": "", "output": f"答案 {i}。" * (i % 7 + 1)} | more for i in range(n)]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps([*alpaca(40), {"instruction": "空", "output": " "}], ensure_ascii=False))
    turns = [{"role": "user", "text": "你好"}, {"role": "assistant", "text": "好"}, {"role": "user", "text": "没有回答"}]
    lines = [turns, turns[:1], turns[:2] * 2, [turns[0], turns[2]]]
    (folder / "b.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def run(data, tmp_path, kind="spm-ours", format=FORMATS["llama-2"], **options):
    return examples([data], tokenizer(kind), format, **{"max_length": 200, "cache": tmp_path / "cache", **options})


def test_what_is_learned_is_counted(data, tmp_path):
    made = run(data, tmp_path, held_out=0.2)
    counts = made.counts
    assert counts.files == 2
    assert counts.examples + counts.held_out_examples == 40 + 3
    assert (counts.empty_answers, counts.unanswered, counts.cut, counts.dropped) == (1, 1, 0, 0)
    assert counts.examples == len(made.train)
    assert counts.tokens == sum(map(len, made.train["input_ids"]))
    assert counts.learned == sum(label != UNLEARNED for row in made.train["labels"] for label in row)
    assert counts.held_out_tokens == sum(label != UNLEARNED for row in made.held_out["labels"] for label in row)
    assert counts.held_out_bytes == sum(made.held_out["bytes"])
    hf, eos = tokenizer("spm-ours"), tokenizer("spm-ours").eos_token_id
    for row in made.held_out:
        answer = hf.decode([id for id in row["labels"] if id not in (UNLEARNED, eos)]).strip()
        assert row["bytes"] == len((" " + answer).encode()) or "你好" in hf.decode(row["input_ids"])


def test_what_follows_the_last_answer_is_left_off(data, tmp_path):
    made = run(data, tmp_path, held_out=0)
    texts = [tokenizer("spm-ours").decode(row["input_ids"]) for row in made.train]
    assert not any("没有回答" in text for text in texts)
    assert made.held_out is None


def test_answers_to_one_question_are_never_on_both_sides(tmp_path):
    data = tmp_path / "a.json"
    data.write_text(json.dumps([*alpaca(30), *alpaca(30, output="另一个回答")]))
    made = run(data, tmp_path, held_out=0.3, format=FORMATS["chatml"], kind="spm-added")
    hf = tokenizer("spm-added")
    questions = [
        {hf.decode(row["input_ids"]).split("问题")[1].split("？")[0] for row in rows} for rows in (made.train, made.held_out)
    ]
    assert not questions[0] & questions[1]
    assert made.counts.held_out_examples == 2 * len(questions[1]) > 6


def test_examples_are_kept_until_something_changes(data, tmp_path, monkeypatch):
    work = []
    monkeypatch.setattr(examples_file, "read", lambda files: work.append(1) or read(files))
    seen = []
    first = run(data, tmp_path, progress=lambda *at: seen.append(at))
    assert seen == [(n, 43) for n in range(1, 44)]
    assert list(run(data, tmp_path).train) == list(first.train)
    assert run(data, tmp_path).counts == first.counts
    assert len(work) == 1
    assert list(run(data, tmp_path, format=FORMATS["llama-2"].jinja).train) == list(first.train)
    assert len(work) == 1
    for n, changed in enumerate(
        [{"format": FORMATS["chatml"]}, {"max_length": 199}, {"too_long": "drop"}, {"kind": "spm-added"}, {"seed": 1},
         {"held_out": 0.1}], 2,
    ):  # fmt: skip
        run(data, tmp_path, **changed)
        assert len(work) == n
    (data / "a.json").write_text(json.dumps(alpaca(41)))
    assert run(data, tmp_path).counts != first.counts
    assert len(work) == 8


def test_the_tokenizers_own_template_is_taken_when_no_format_is_named(data, tmp_path):
    made = run(data, tmp_path, kind="spm-added", format=None, held_out=0)
    assert list(made.train) == list(run(data, tmp_path, kind="spm-added", format=FORMATS["chatml"], held_out=0).train)
    with pytest.raises(PromptError, match=r"has no chat template\. Name a prompt format: alpaca, "):
        run(data, tmp_path, format=None)


@pytest.mark.parametrize(
    ("content", "options", "error", "words"),
    [
        ("[]", {}, CorpusError, "holds no records"),
        ('{"a": 1}', {}, CorpusError, "expected a list"),
        (json.dumps(alpaca(1)), {}, CorpusError, "of 1 conversations all would be held out"),
        (
            json.dumps(alpaca(3, output="")),
            {},
            CorpusError,
            "nothing to learn in .*: 3 conversations have an answer without text",
        ),
        (json.dumps(alpaca(9)), {"max_length": 20}, CorpusError, "no example fits in 20 tokens: 9 dropped. Raise max_length"),
        (json.dumps(alpaca(9)), {"max_length": 1}, CorpusError, "max_length is 1"),
        (json.dumps(alpaca(9)), {"held_out": -1}, CorpusError, "held_out -1"),
        (json.dumps(alpaca(9), ensure_ascii=False).encode("gbk"), {}, CorpusError, "iconv -f GB18030"),
        (
            json.dumps(alpaca(2)),
            {"format": "{{ raise_exception('no system') }}"},
            PromptError,
            r"a\.json: record 1: .*no system",
        ),
    ],
)
def test_what_is_refused(tmp_path, content, options, error, words):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=words):
        run(tmp_path, tmp_path, **options)
    assert not list(tmp_path.rglob("*.arrow"))

"""What is learned of a conversation, token by token, in every format and with tokenizers of every kind."""

import unicodedata

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, runs, text_between, tokenizer

from cnq import chat, prompts
from cnq.engine.model import Model
from training.batches import UNLEARNED
from training.conversation import Formatter
from training.encoding import Encoder

# What stands before and behind an answer, and behind the last one; from the formats' own sources, eos as </s>.
ENDS = {
    "alpaca": ("", "", "</s>"), "alpaca-training": ("", "", "</s>"), "llama-2": (" ", "</s>", "</s>"),
    "llama-3": ("", "<|eot_id|>", "<|eot_id|>"), "chatml": ("", "<|im_end|>", "<|im_end|>"), "vicuna": (" ", "</s>", "</s>"),
    "chinese-vicuna": ("", "", "</s>"), "promptcblue": ("", "\n</s>", "\n</s>"), "baichuan": ("", "</s>", "</s>"),
    "baichuan-2": ("", "", "</s>"), "65b": ("", "\n<|im_end|>", "\n<|im_end|>"),
}  # fmt: skip
TALK = [
    {"role": "system", "content": "你是一个助手。"},
    {"role": "user", "content": "What is 1+1? 一加一"},
    {"role": "assistant", "content": "The answer is 2。"},
    {"role": "user", "content": "为什么？\n"},
    {"role": "assistant", "content": "因为 a 😀 龘"},
]


def test_no_format_is_forgotten():
    assert ENDS.keys() == prompts.FORMATS.keys()


def tokens(kind, template, messages):
    formatter = Formatter(Encoder(tokenizer(kind)), template)
    (found,) = formatter.tokens([formatter.split(messages)])
    return found


def expected(kind, format, answers):
    eos = tokenizer(kind).eos_token
    before, inside, last = (part.replace("</s>", eos) for part in ENDS[format.name])
    return [before + answer + (last if n == len(answers) else inside) for n, answer in enumerate(answers, 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", prompts.FORMATS)
def test_learned_are_exactly_the_answers_and_what_ends_them(name, kind):
    found = tokens(kind, prompts.FORMATS[name], TALK)
    assert all(label in (UNLEARNED, id) for label, id in zip(found.labels, found.input_ids, strict=True))
    spans = runs([label != UNLEARNED for label in found.labels])
    texts = [text_between(tokenizer(kind), found.input_ids, *span) for span in spans]
    assert texts == expected(kind, prompts.FORMATS[name], [m["content"] for m in TALK if m["role"] == "assistant"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", prompts.FORMATS)
def test_bytes_are_those_of_the_answers_without_special_tokens(name, kind):
    special = [token.content for token in tokenizer(kind).added_tokens_decoder.values() if token.special]
    want = 0
    for text in expected(kind, prompts.FORMATS[name], [m["content"] for m in TALK if m["role"] == "assistant"]):
        for token in special:
            text = text.replace(token, "")
        want += len(text.encode())
    assert tokens(kind, prompts.FORMATS[name], TALK).nbytes == want


QUESTIONS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "你是一个助手。"}, {"role": "user", "content": "Hello, 世界！\n"}],
    [{"role": "user", "content": "  一 "}, {"role": "assistant", "content": "二。"}, {"role": "user", "content": "😀<s>量。"}],
    TALK[:2],
    TALK[:4],
]
ANSWERS = ["The", "好。", " indented", "\n\nlines", "量化"]


@pytest.mark.parametrize("vocab", ["spm-added", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("name", [None, *prompts.FORMATS])
def test_what_comes_before_an_answer_is_what_llama_cpp_is_given_in_a_chat(gguf, vocab, name):
    """The prompt of cnq chat, by llama.cpp's tokenizer, whatever the answer begins with."""
    path = gguf(vocab=vocab)
    template = prompts.FORMATS[name] if name else tokenizer(vocab).chat_template
    with Model(path, n_ctx=256) as model:
        style = chat.style_of(model.fields, path, name)
        for question in QUESTIONS:
            prompt = chat.prompt_tokens(model, style, question)
            for answer in ANSWERS:
                found = tokens(vocab, template, [*question, {"role": "assistant", "content": answer}])
                (begin, _) = runs([label != UNLEARNED for label in found.labels])[-1]
                assert found.input_ids[:begin] == prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", prompts.FORMATS)
def test_a_bos_that_the_tokenizer_adds_is_there_once(name, kind):
    bos, eos = tokenizer(kind).bos_token, tokenizer(kind).eos_token
    found, encoder = tokens(kind, prompts.FORMATS[name], TALK[:3]), Encoder(tokenizer(kind))
    assert encoder.bos == tokenizer(kind)("").input_ids == ([] if kind == "qwen2" else [tokenizer(kind).bos_token_id])
    if encoder.bos:
        text = prompts.render(prompts.FORMATS[name].jinja, TALK[:3], bos=bos, eos=eos, add_generation_prompt=False)
        assert found.input_ids[0] == encoder.bos[0]
        assert found.labels[0] == UNLEARNED
        assert found.input_ids.count(encoder.bos[0]) == 1 + text.removeprefix(bos).count(bos)


# ▁ is left out: for SentencePiece it is a space
TEXTS = st.text(
    st.sampled_from("a The中量。，\n\t \u3000😀é龘<s>[/INST]#:") | st.characters(exclude_characters="▁", codec="utf-8"),
    min_size=1, max_size=14,
).filter(str.strip)  # fmt: skip


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.sampled_from(KINDS))
@example([("a", "\nb\n"), ("c", "  d")], "llama-bpe")
@example([("a", "b</s>c"), ("<s>", "<|im_end|>")], "spm-added")
@example([("a", "e\u0301")], "qwen2")
@settings(max_examples=40, deadline=None)
def test_whatever_is_said_the_answers_are_learned(rounds, kind):
    talk = [{"role": role, "content": text} for pair in rounds for role, text in zip(("user", "assistant"), pair, strict=True)]
    for format in prompts.FORMATS.values():
        ids, labels = (found := tokens(kind, format, talk)).input_ids, found.labels
        spans = runs([label != UNLEARNED for label in labels])
        want = expected(kind, format, [answer for _, answer in rounds])
        assert len(spans) == len(want)
        for (begin, end), text in zip(spans, want, strict=True):
            got, but_last = (plain(kind, tokenizer(kind).decode(ids[begin:to])) for to in (end, end - 1))
            # Without an end token the last token of an answer may reach into what follows it
            assert got == plain(kind, text) or (got.startswith(plain(kind, text)) and plain(kind, text).startswith(but_last))


def plain(kind: str, text: str) -> str:
    """Without what a tokenizer may change: spaces beside special tokens and in front, composed characters, cut ones."""
    return unicodedata.normalize("NFC", text).replace(" ", "").rstrip("\ufffd")

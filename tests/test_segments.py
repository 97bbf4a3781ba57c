"""Which part of a conversation is learned: split exactly, for every format and for templates of published models."""

import json

import pytest
import renderers
import tiny
from hypothesis import given
from hypothesis import strategies as st
from renderers import CONVERSATIONS

from cnq import prompts
from cnq.chat import Chat, style_of
from cnq.convert import convert
from cnq.engine.model import Model
from cnq.errors import PromptError
from cnq.gguf_file import GgufFile
from cnq.inspection import inspect
from cnq.prompts.endings import _ENDS

TALK = [*CONVERSATIONS["system text and rounds"], {"role": "assistant", "content": "4\n"}]
# What each format says after an answer inside a text, and after the last.
ENDS = {
    "alpaca": ("", "</s>"), "alpaca-training": ("", "</s>"), "llama-2": ("</s>", "</s>"), "llama-3": ("<|eot_id|>",) * 2,
    "chatml": ("<|im_end|>",) * 2, "vicuna": ("</s>", "</s>"), "chinese-vicuna": ("", "</s>"), "promptcblue": ("\n</s>",) * 2,
    "baichuan": ("</s>", "</s>"), "baichuan-2": ("", "</s>"), "65b": ("\n<|im_end|>",) * 2,
}  # fmt: skip


def split(template, messages):
    parts = prompts.segments(template, messages, bos="<s>", eos="</s>")
    jinja = template if isinstance(template, str) else template.jinja
    assert "".join(text for text, _ in parts) == prompts.render(
        jinja, messages, bos="<s>", eos="</s>", add_generation_prompt=False
    )
    return parts


@pytest.mark.parametrize("name", prompts.FORMATS)
def test_learned_are_the_answers_and_their_ends(name):
    parts = split(prompts.FORMATS[name], TALK)
    inside, last = ENDS[name]
    lead = " " if name in ("llama-2", "vicuna") else ""
    assert [text for text, learned in parts if learned] == [lead + "2" + inside, lead + "4\n" + last]


@pytest.mark.parametrize("name", prompts.FORMATS)
def test_what_is_not_learned_is_the_prompt_that_a_chat_would_send(name):
    """At an answer's place in training the model has before it exactly what it has in a chat."""
    format, before, i = prompts.FORMATS[name], "", 0
    answers = [n for n, message in enumerate(TALK) if message["role"] == "assistant"]
    for text, learned in split(format, TALK):
        if learned:
            assert before == prompts.render(format.jinja, TALK[: answers[i]], bos="<s>", eos="</s>")
            i += 1
        before += text
    assert i == len(answers)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_conversation_is_split_exactly(name):
    for format in prompts.FORMATS.values():
        messages = [*CONVERSATIONS[name], {"role": "assistant", "content": " 答 "}]
        learned = "".join(text for text, learned in split(format, messages) if learned)
        for message in messages:
            if message["role"] == "assistant":
                assert message["content"] in learned


TEXTS = st.text(st.sampled_from("a 中\n<s>|/[INT]#:\ue000\ue001"), max_size=12)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_any_conversation_is_split_exactly(rounds):
    messages = [
        {"role": role, "content": text} for round in rounds for role, text in zip(("user", "assistant"), round, strict=True)
    ]
    for format in prompts.FORMATS.values():
        learned = [text for text, learned in split(format, messages) if learned]
        lead = " " if format.name in ("llama-2", "vicuna") else ""
        ends = ENDS[format.name]
        want = [lead + answer + ends[i == len(rounds) - 1] for i, (_, answer) in enumerate(rounds)]
        assert learned == [text for text in want if text]


def test_templates_of_published_models():
    """Whatever they put around answers or strip from them: nothing is lost, and every answer is learned with its end."""
    done = 0
    for name, template in renderers.real_templates().items():
        for messages in (TALK, TALK[1:]):
            try:
                prompts.render(template, messages, bos="<s>", eos="</s>", add_generation_prompt=False)
            except PromptError:
                continue  # tools that are missing, a role that it has not
            learned = [text for text, learned in split(template, messages) if learned]
            assert len(learned) == 2, name
            assert "2" in learned[0], name
            assert "4" in learned[1], name
            assert not any("1+1" in text or "2+2" in text or "brief" in text for text in learned), name
            done += 1
    assert done >= 4


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("CHATML_CHAT_TEMPLATE", ["2<|im_end|>", "4\n<|im_end|>"]),
        ("LLAMA3_INSTRUCT_CHAT_TEMPLATE", ["2<|eot_id|>", "4<|eot_id|>"]),
        ("MIXTRAL_INSTRUCT_CHAT_TEMPLATE", ["2</s>", "4\n</s>"]),
        ("Qwen-Qwen2.5-7B-Instruct", ["2<|im_end|>", "4\n<|im_end|>"]),
        ("Qwen-Qwen3-0.6B", ["2<|im_end|>", "<think>\n\n</think>\n\n4\n<|im_end|>"]),  # thinks in the last answer only
        ("deepseek-ai-DeepSeek-V3.1", ["2<｜end▁of▁sentence｜>", "4\n<｜end▁of▁sentence｜>"]),
        ("microsoft-Phi-3.5-mini-instruct", ["2<|end|>", "4\n<|end|>\n</s>"]),  # ends a text by one token more
        ("google-gemma-2-2b-it", ["2<end_of_turn>", "4<end_of_turn>"]),
    ],
)
def test_what_published_templates_let_a_model_learn(name, want):
    if name not in (templates := renderers.real_templates()):
        pytest.skip("llama.cpp's source is not there")
    assert [text for text, learned in split(templates[name], TALK[1:]) if learned] == want


@pytest.mark.parametrize("name", prompts.FORMATS)
def test_without_answers_nothing_is_learned(name):
    assert not any(learned for _, learned in split(prompts.FORMATS[name], TALK[:2]))


def test_a_generation_tag_changes_nothing():
    tagged = "{% for m in messages %}{% generation %}{{ m['role'] + m['content'] }}{% endgeneration %}{% endfor %}"
    assert prompts.render(tagged, TALK[1:2]) == "user1+1?"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "leaves an answer"),
        (
            "{% for m in messages %}{{ m['content'] | replace('2', '') | length }};{{ m['content'] }}{% endfor %}",
            "cannot be found",
        ),
        ("{{ raise_exception('no') }}", "refuses this conversation: no"),
        ("{% if %}", "cannot be rendered"),
    ],
)
def test_templates_that_hide_the_answers_are_refused(template, words):
    with pytest.raises(PromptError, match=words):
        prompts.segments(template, TALK)


# Ends


def with_tokens(folder, names, **fields):
    """A GGUF with further special tokens."""
    source = tiny.checkpoint(folder / "hf", vocab="spm-added", vocab_size=424 + len(names))
    config = json.loads((source / "tokenizer_config.json").read_text())
    special = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    config["added_tokens_decoder"] |= {str(424 + i): {"content": name, **special} for i, name in enumerate(names)}
    (source / "tokenizer_config.json").write_text(json.dumps(config | fields, ensure_ascii=False))
    return convert(source, folder / "tiny.gguf").path


@pytest.mark.parametrize("harmony", [True, False])
def test_which_tokens_end_an_answer_is_what_llama_cpp_says(harmony, tmp_path):
    """ "<|end|>" ends nothing where gpt-oss's tokens stand beside it."""
    there = _ENDS - ({"<|end|>"} if harmony else {"<|call|>", "<|calls|>"}) - {"<|im_end|>", "</s>", "<|tool_response>"}
    names = [*sorted(there), "<|user|>", "<end>", "<|pad|>"]
    path = with_tokens(tmp_path, names)
    fields = GgufFile(path).fields
    with Model(path, n_ctx=64) as model:
        for text in (*names, "<s>", "</s>", "<|im_start|>", "<|im_end|>", "量化"):
            token = fields["tokenizer.ggml.tokens"].index(text)
            template = "{% for m in messages %}{{ m['content'] + '" + text + "' }}{% endfor %}"
            assert prompts.ending(template, fields) == prompts.Ending(text, token, model.ends(token))
            assert model.ends(token) == (text in _ENDS)


ODD = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|stop|>' }}{% endfor %}"


def test_a_chat_stops_at_an_end_that_llama_cpp_does_not_know(tmp_path):
    """The commonest complaint: the template ends answers with a token that nothing counts as an end."""
    path = with_tokens(tmp_path, ["<|stop|>"], chat_template=ODD)
    with Model(path, n_ctx=256) as model:
        style = style_of(model.fields, path, None)
        assert style.end == model.fields["tokenizer.ggml.tokens"].index("<|stop|>")
        assert "<|stop|>" in style.stop
        chat = Chat(model, style)
        said = model.tokenize("好的", add_special=False, parse_special=False)
        model.generate = lambda *_: iter([*said, style.end, *said])  # a model that was trained with this template
        assert "".join(chat.ask("你好")) == "好的"
    (note,) = inspect(path).notes
    assert "<|stop|>, which is none of the tokens that llama.cpp stops at" in note
    assert "eos_token" in note


def test_an_end_that_is_no_token(gguf):
    fields = GgufFile(gguf(vocab="spm")).fields
    found = prompts.ending(ODD, fields)
    assert found == prompts.Ending("<|stop|>", None, False)
    assert "no token of its vocabulary" in found.warning


@pytest.mark.parametrize(("template", "counted"), [("llama-2", True), ("chatml", True), ("alpaca", True), ("65b", True)])
def test_ends_that_are_well(template, counted, gguf):
    found = prompts.ending(prompts.FORMATS[template], GgufFile(gguf(vocab="spm-added")).fields)
    assert found.counted == counted
    assert found.warning is None


def test_a_template_without_an_end_and_one_that_raises(gguf):
    path = gguf(vocab="spm-added")
    fields = GgufFile(path).fields
    assert prompts.ending("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", fields) is None
    assert style_of({**fields, "tokenizer.chat_template": "{{ 1/0 }}"}, path, None).end is None

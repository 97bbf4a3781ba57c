"""Prompt formats: exact text, one bos, and templates recognised by what they render."""

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from cnq import prompts
from cnq.chat import Chat, Style, prompt_tokens, style_of
from cnq.engine.model import Model
from cnq.errors import PromptError
from cnq.gguf_file import GgufFile

SYSTEM = {"role": "system", "content": "你是助手。"}
TURNS = [
    {"role": "user", "content": "你好\n"},
    {"role": "assistant", "content": "好。"},
    {"role": "user", "content": "再见"},
]
# Written out from the sources that cnq/prompts/formats.py names, with <s> for bos and </s> for eos.
EXACT = {
    "alpaca": (
        "<s>你是助手。\n\n### Instruction:\n\n你好\n\n\n### Response:\n\n好。\n\n### Instruction:\n\n再见\n\n### Response:\n\n"
    ),
    "alpaca-training": (
        "<s>你是助手。\n\n### Instruction:\n你好\n\n\n### Response: 好。\n\n### Instruction:\n再见\n\n### Response: "
    ),
    "llama-2": "<s>[INST] <<SYS>>\n你是助手。\n<</SYS>>\n\n你好\n [/INST] 好。</s><s>[INST] 再见 [/INST]",
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\n你是助手。<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n你好\n<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n好。<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n再见<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "chatml": (
        "<|im_start|>system\n你是助手。<|im_end|>\n<|im_start|>user\n你好\n<|im_end|>\n"
        "<|im_start|>assistant\n好。<|im_end|>\n<|im_start|>user\n再见<|im_end|>\n<|im_start|>assistant\n"
    ),
    "vicuna": "<s>你是助手。 USER: 你好\n ASSISTANT: 好。</s>USER: 再见 ASSISTANT:",
    "chinese-vicuna": "<s>你是助手。\n\nUser:你好\n\n\nAssistant:好。\n\nUser:再见\n\nAssistant:",
    "promptcblue": "<s>问：\n你是助手。\n你好\n\n答：\n好。\n</s><s>问：\n再见\n答：\n",
    "baichuan": "你是助手。<reserved_102>你好\n<reserved_103>好。</s><reserved_102>再见<reserved_103>",
    "baichuan-2": "你是助手。<reserved_106>你好\n<reserved_107>好。<reserved_106>再见<reserved_107>",
    "65b": (
        "<s><|im_start|>system\n你是助手。\n<|im_end|>\n<|im_start|>user\n你好\n\n<|im_end|>\n<|im_start|>assistant\n好。\n<|im_end|>\n"
        "<|im_start|>user\n再见\n<|im_end|>\n<|im_start|>assistant\n"
    ),
}
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
BILINGUAL = "You are a helpful assistant. 你是一个乐于助人的助手。"

TRAINED = {
    "alpaca": f"<s>{ALPACA}\n\n### Instruction:\n\n问\n\n### Response:\n\n答</s>",
    "alpaca-training": f"<s>{ALPACA}\n\n### Instruction:\n问\n\n### Response: 答</s>",
    "llama-2": f"<s>[INST] <<SYS>>\n{BILINGUAL}\n<</SYS>>\n\n问 [/INST] 答</s>",
    "llama-3": (
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{BILINGUAL}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n问"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n答<|eot_id|>"
    ),
    "chatml": "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>\n",
    "vicuna": (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. USER: 问 ASSISTANT: 答</s>"
    ),
    "chinese-vicuna": (
        "<s>The following is a conversation between an AI assistant called Assistant and a human user called User. The "
        "assistant is intelligent, knowledgeable and polite to answer questions of user.\n\nUser:问\n\nAssistant:答</s>"
    ),
    "promptcblue": "<s>问：\n问\n答：\n答\n</s>",
    "baichuan": "<reserved_102>问<reserved_103>答</s>",
    "baichuan-2": "<reserved_106>问<reserved_107>答</s>",
    "65b": "<s><|im_start|>user\n问\n<|im_end|>\n<|im_start|>assistant\n答\n<|im_end|>",
}


def render(name, messages):
    return prompts.render(prompts.FORMATS[name].jinja, messages, bos="<s>", eos="</s>")


@pytest.mark.parametrize("name", prompts.FORMATS)
def test_a_conversation_is_written_exactly_so(name):
    assert render(name, [SYSTEM, *TURNS]) == EXACT[name]


@pytest.mark.parametrize("name", prompts.FORMATS)
def test_a_training_text_is_that_of_the_authors(name):
    """One round, as the training scripts write it."""
    round = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    text = prompts.render(prompts.FORMATS[name].jinja, round, bos="<s>", eos="</s>", add_generation_prompt=False)
    assert text == TRAINED[name]


@pytest.mark.parametrize(("name", "system"), [("alpaca", ALPACA), ("llama-2", BILINGUAL), ("llama-3", BILINGUAL)])
def test_without_a_system_text_the_one_of_the_training_is_used(name, system):
    assert render(name, TURNS) == render(name, [{"role": "system", "content": system}, *TURNS])


@pytest.mark.parametrize("name", prompts.FORMATS)
def test_transformers_renders_the_same_text(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny.tokenizer(tmp_path, "spm-added")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    jinja = prompts.FORMATS[name].jinja
    want = tokenizer.apply_chat_template([SYSTEM, *TURNS], chat_template=jinja, tokenize=False, add_generation_prompt=True)
    assert render(name, [SYSTEM, *TURNS]) == want


@pytest.mark.parametrize("name", prompts.FORMATS)
def test_a_template_is_recognised_by_what_it_renders(name):
    found = prompts.of_template("{# some comment #}" + prompts.FORMATS[name].jinja)
    assert found == (prompts.FORMATS[name], prompts.FORMATS[name].system)


def test_a_template_with_a_system_text_of_its_own():
    jinja = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nI am tiny<|im_end|>\\n' }}{% endif %}" + tiny.CHATML
    )
    assert prompts.of_template(jinja) == (prompts.CHATML, "I am tiny")


@pytest.mark.parametrize(
    "jinja",
    ["{{ messages[0]['content'] }}", "{% for", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ messages.x.y.z }}", ""],
)
def test_another_template_is_none_of_ours(jinja):
    assert prompts.of_template(jinja) is None


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch /tmp/x') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_hostile_template_runs_into_the_sandbox(jinja):
    with pytest.raises(PromptError):
        prompts.render(jinja, [dict(m) for m in TURNS])


@pytest.mark.parametrize("format", prompts.FORMATS)
@pytest.mark.parametrize("vocab", ["spm-added", "llama-bpe", "qwen2"])
def test_exactly_one_bos_or_none(format, vocab, gguf):
    """A tokenizer that adds bos and a template that writes it must not make two."""
    with Model(gguf(vocab=vocab), n_ctx=64) as model:
        style = Style(prompts.FORMATS[format].jinja, (), None)
        ids = prompt_tokens(model, style, [SYSTEM, TURNS[0]])
        bos = model.fields["tokenizer.ggml.bos_token_id"]
        text = prompts.render(style.jinja, [SYSTEM, TURNS[0]], bos="<bos>")
        assert ids[:2] != [bos, bos] or text.removeprefix("<bos>").startswith(model.token_text("bos"))  # it opens turns too
        if model.adds_bos:
            assert ids[0] == bos


def test_a_chat_without_a_template_asks_for_a_format(gguf):
    path = gguf(vocab="spm")
    fields = GgufFile(path).fields
    with pytest.raises(PromptError, match=r"--format alpaca\|.*llama-2\|"):
        style_of(fields, path, None)
    assert style_of(fields, path, "alpaca").stop == ("### Instruction:",)
    with pytest.raises(PromptError, match=r"unknown prompt format klingon; known are alpaca, .*alpaca-2"):
        style_of(fields, path, "klingon")
    assert prompts.named("alpaca-2") is prompts.FORMATS["llama-2"]


def test_the_tokens_of_a_chat_are_those_of_transformers(gguf):
    """The whole way: our template, our bos, llama.cpp's tokenizer, against apply_chat_template."""
    transformers = pytest.importorskip("transformers")
    for vocab in ("qwen2", "llama-bpe", "spm-added"):
        path = gguf(vocab=vocab)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent / "hf")
        want = tokenizer.apply_chat_template([SYSTEM, *TURNS], add_generation_prompt=True, return_dict=False)
        with Model(path, n_ctx=256) as model:
            chat = Chat(model, style_of(model.fields, path, None))
            got = prompt_tokens(model, chat.style, [SYSTEM, *TURNS])
            if model.adds_bos and want[0] != tokenizer.bos_token_id:
                want = [tokenizer.bos_token_id, *want]  # the template leaves it to the tokenizer; llama.cpp adds it
            assert got == want, vocab


@given(st.lists(st.sampled_from(["a", "é", "中", "😀", "\n"]), max_size=20).map("".join))
def test_any_text_survives_every_format(text):
    for name in prompts.FORMATS:
        assert text in render(name, [{"role": "user", "content": text}])

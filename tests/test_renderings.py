"""One conversation, one prompt: Jinja as transformers and as llama-server run it, ours, and Ollama's template run by Go.

Compared are token ids, through the tokenizer that each has: transformers', and llama.cpp's, which is Ollama's too.
llama.cpp's Jinja engine is no part of its library; where `make bench` has built it, it is compared as text.
"""

import re
from pathlib import Path

import pytest
import renderers
import sentencepiece
import tiny
from renderers import CONVERSATIONS

from cnq import prompts
from cnq.chat import Style, prompt_tokens
from cnq.convert import convert
from cnq.engine.model import Model

REAL = Path(__file__).parents[1] / ".." / "shared" / "data"
FORMATS = list(prompts.FORMATS.values())


def through_ollama(format, messages):
    """The messages as Ollama hands them to a template: its server puts the Modelfile's SYSTEM first where there is none."""
    if format.system and (not messages or messages[0]["role"] != "system"):
        return [{"role": "system", "content": format.system}, *messages]
    return messages


def go_prompts(format, conversations, bos="<s>", eos="</s>", adds_bos=True):
    template = format.go(bos, eos, adds_bos=adds_bos)
    answers = renderers.go([{"template": template, "messages": through_ollama(format, c)} for c in conversations])
    assert not any(a["error"] for a in answers), answers
    return [a["text"] for a in answers]


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("prompt", [True, False])
def test_llama_server_renders_our_templates_alike(format, prompt):
    ours = [
        prompts.render(format.jinja, c, bos="<s>", eos="</s>", add_generation_prompt=prompt) for c in CONVERSATIONS.values()
    ]
    asked = [
        {"template": format.jinja, "messages": c, "bos": "<s>", "eos": "</s>", "prompt": prompt} for c in CONVERSATIONS.values()
    ]
    theirs = renderers.llama_server(asked)
    assert dict(zip(CONVERSATIONS, ours, strict=True)) == dict(zip(CONVERSATIONS, theirs, strict=True))


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_go_says_the_same_text(format):
    theirs = go_prompts(format, CONVERSATIONS.values())
    for (name, conversation), text in zip(CONVERSATIONS.items(), theirs, strict=True):
        ours = prompts.render(format.jinja, conversation, bos="<s>", eos="</s>")
        assert ours.removeprefix("<s>") == text, name


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("vocab", ["spm-added", "qwen2", "llama-bpe"])
def test_three_renderings_give_the_same_tokens(format, vocab, gguf):
    if (format.name, vocab) == ("chatml", "llama-bpe"):
        pytest.skip("this bos opens turns too, and the tokenizer puts one first: twice in Ollama, of which cnq ollama warns")
    compare_tokens(format, gguf(vocab=vocab))


def compare_tokens(format, path):
    """transformers' tokens of its rendering, ours of ours, and Ollama's of Go's."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent / "hf")
    with Model(path, n_ctx=64) as model:
        bos, eos = model.token_text("bos"), model.token_text("eos")
        go_texts = go_prompts(format, CONVERSATIONS.values(), bos, eos, model.adds_bos)
        for (name, conversation), go_text in zip(CONVERSATIONS.items(), go_texts, strict=True):
            ours = prompt_tokens(model, Style(format.jinja, (), None), conversation)
            assert ours == model.tokenize(go_text, add_special=True, parse_special=True), name
            if not transformers_and_llama_cpp_read_alike(go_text, tokenizer):
                continue
            theirs = tokenizer.apply_chat_template(
                conversation, chat_template=format.jinja, add_generation_prompt=True, return_dict=False
            )
            if model.adds_bos and theirs[0] != tokenizer.bos_token_id:
                theirs = [tokenizer.bos_token_id, *theirs]  # the template leaves it to the tokenizer; llama.cpp's adds it
            assert ours == theirs, name


def transformers_and_llama_cpp_read_alike(text, tokenizer):
    """Two known differences of the tokenizers: SentencePiece's space before a text that begins with one, and Qwen's NFC."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    composed = normalizer.normalize_str(text) if type(normalizer).__name__ == "NFC" else text
    return not text.startswith(" ") and composed == text


@pytest.mark.parametrize("name", ["llama2-tokenizer.model", "chinese-llama2-tokenizer.model"])
def test_prompts_in_tokens_of_real_vocabularies(name, tmp_path):
    """Against SentencePiece: transformers' conversion of these tokenizers merges double spaces and equal scores otherwise."""
    if not (REAL / name).is_file():
        pytest.skip(f"no {name}")
    pieces = sentencepiece.SentencePieceProcessor(str(REAL / name))
    source = tiny.checkpoint(tmp_path / "hf", vocab="spm", vocab_size=pieces.get_piece_size())
    (source / "tokenizer.model").write_bytes((REAL / name).read_bytes())
    with Model(convert(source, tmp_path / "tiny.gguf").path, n_ctx=64) as model:
        for format in FORMATS:
            for (label, conversation), go_text in zip(
                CONVERSATIONS.items(), go_prompts(format, CONVERSATIONS.values()), strict=True
            ):
                want = [1]
                for part in re.split("(<s>|</s>)", go_text):
                    want += [{"<s>": 1, "</s>": 2}[part]] if part in ("<s>", "</s>") else pieces.encode(part)
                assert prompt_tokens(model, Style(format.jinja, (), None), conversation) == want, (format.name, label)
                assert model.tokenize(go_text, add_special=True, parse_special=True) == want, (format.name, label)


@pytest.mark.parametrize(
    ("format", "built_in", "names"),
    [
        ("chatml", "chatml", ["a question", "system text and rounds", "line ends at the end"]),
        ("llama-3", "llama3", ["with system text", "system text and rounds"]),  # it strips texts
        ("llama-2", "llama2-sys-bos", ["with system text"]),  # it leaves out the space before earlier answers
    ],
)
def test_formats_that_llama_cpp_has_built_in(format, built_in, names):
    for name in names:
        ours = prompts.render(prompts.FORMATS[format].jinja, CONVERSATIONS[name], bos="<s>", eos="</s>")
        assert ours.removeprefix("<s>") == renderers.built_in(built_in, CONVERSATIONS[name]).removeprefix("<s>")


def test_templates_from_before_messages():
    """The Go program knows Ollama's older mode: the Modelfile that the authors of Chinese-LLaMA-Alpaca-3 publish is in it."""
    role = "<|start_header_id|>{}<|end_header_id|>\n\n"
    theirs = (
        f"{{{{ if .System }}}}{role.format('system')}{{{{ .System }}}}<|eot_id|>{{{{ end }}}}"
        f"{{{{ if .Prompt }}}}{role.format('user')}{{{{ .Prompt }}}}<|eot_id|>{{{{ end }}}}"
        f"{role.format('assistant')}{{{{ .Response }}}}<|eot_id|>"
    )
    format = prompts.FORMATS["llama-3"]
    conversations = [CONVERSATIONS[name] for name in ("a question", "with system text", "rounds", "system text and rounds")]
    answers = renderers.go([{"template": theirs, "messages": through_ollama(format, c)} for c in conversations])
    assert [a["text"] for a in answers] == go_prompts(format, conversations)


@pytest.mark.parametrize("name", ["CHATML_CHAT_TEMPLATE", "LLAMA3_INSTRUCT_CHAT_TEMPLATE", "Qwen-Qwen2.5-7B-Instruct"])
def test_a_recognised_template_goes_to_ollama_as_the_format_it_is(name):
    """Of templates that come with models, Go must say what transformers would: for conversations that take turns."""
    templates = renderers.real_templates()
    if name not in templates:
        pytest.skip("llama.cpp's source is not there")
    found = prompts.of_template(templates[name])
    assert found
    format, system = found
    for label in ("a question", "with system text", "rounds", "system text and rounds"):
        conversation = CONVERSATIONS[label]
        first = [{"role": "system", "content": system}] if system and conversation[0]["role"] != "system" else []
        (text,) = (a["text"] for a in renderers.go([{"template": format.go("<s>", "</s>"), "messages": first + conversation}]))
        assert prompts.render(templates[name], conversation, bos="<s>", eos="</s>").removeprefix("<s>") == text


def test_real_templates_are_rendered_as_transformers_does():
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    compared = 0
    for name, template in renderers.real_templates().items():
        conversation = CONVERSATIONS["rounds"]
        extra = {"bos_token": "<s>", "eos_token": "</s>"}
        try:
            (want,), _ = transformers.render_jinja_template(
                [conversation], chat_template=template, add_generation_prompt=True, **extra
            )
        except Exception:
            continue
        assert prompts.render(template, conversation, bos="<s>", eos="</s>") == want, name
        compared += 1
    assert compared >= 4

"""llama.cpp, loading our GGUF, cuts a page of difficult text into the same tokens as the tokenizer it was made from."""

import json
from pathlib import Path
from unicodedata import normalize

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnq.engine.model import Model

PAGE = [
    *tiny.SENTENCES,
    "",
    " ",
    "  前后有空格  ",
    "\n\n\t换行\r\n和\u3000全角空格\u00a0不间断",
    "數字 ３．１４ 与 3.1415926，１２３４ 和 1234567890",
    "Emoji: 😀👨‍👩‍👧‍👦🇨🇳 ❤️‍🔥 é é ﬁ ½ Ω K",
    'for (int i = 0; i < 10; ++i) {\n\tprintf("%d\\n", i);\n}\n',
    "It's we'll I'D they'RE 'tis o'clock",
    "！“”‘’《》——……、。，；：？",
    "日本語のテキスト 한국어 텍스트 Русский текст العربية ไทย",
    "<|im_start|>not special here</s><s>[PAD]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "𠀀𠮷野家 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "\ufeffBOM \u200b零宽 \u0000nul",
]
PRE = ["llama-bpe", "smaug-bpe", "qwen2", "smollm", "gpt-2", "deepseek-llm", "deepseek-coder", "deepseek-v3", "tekken"]
# Any text, but composed: llama.cpp does not normalize, and Qwen2's tokenizer does (NFC).
TEXT = st.text(st.characters(exclude_categories=("Cs", "Mn", "Mc", "Me")), max_size=60).map(lambda s: normalize("NFC", s))


def tokens(model: Model, text: str) -> list[int]:
    return model.tokenize(text, add_special=False, parse_special=False)


def hf_ids(path: Path):
    """tokenizer.json, run by the tokenizers package, special tokens read as plain text."""
    from tokenizers import Tokenizer

    content = json.loads(path.read_text(encoding="utf-8"))
    for entry in content["added_tokens"]:
        entry["special"] = entry["content"].startswith("<")
    content["added_tokens"] = [e for e in content["added_tokens"] if not e["special"]]
    content["post_processor"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=PRE)
def byte_level(request, gguf):
    pytest.importorskip("tokenizers")
    path = gguf(vocab=request.param)
    with Model(path, n_ctx=64) as model:
        yield model, hf_ids(path.parent / "hf" / "tokenizer.json")


def test_byte_level_bpe_equals_tokenizers(byte_level):
    model, want = byte_level
    for text in PAGE:
        assert tokens(model, text) == want(text), repr(text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_byte_level_bpe_equals_tokenizers_on_any_text(byte_level, text):
    model, want = byte_level
    assert tokens(model, text) == want(text)


@pytest.fixture(scope="module", params=["spm", "spm-symbols"])
def sentencepiece_model(request, gguf):
    import sentencepiece

    path = gguf(vocab=request.param)
    pieces = sentencepiece.SentencePieceProcessor(str(path.parent / "hf" / "tokenizer.model"))
    with Model(path, n_ctx=64) as model:
        yield model, pieces.encode


def test_sentencepiece_equals_sentencepiece(sentencepiece_model):
    model, want = sentencepiece_model
    for text in PAGE:
        assert tokens(model, text) == want(text), repr(text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_sentencepiece_equals_sentencepiece_on_any_text(sentencepiece_model, text):
    model, want = sentencepiece_model
    assert tokens(model, text) == want(text)


def test_tokenizer_json_alone_keeps_the_order_of_the_merges(gguf):
    """The reference converter scores every token -1000 here, and loses it."""
    pytest.importorskip("tokenizers")
    path = gguf(vocab="spm-json")
    want = hf_ids(path.parent / "hf" / "tokenizer.json")
    with Model(path, n_ctx=64) as model:
        for text in PAGE:
            if text:  # HF's Prepend puts a "▁" before nothing, sentencepiece and llama.cpp do not
                assert tokens(model, text) == want(text), repr(text)


def test_added_tokens_are_single_tokens_and_controls_are_read_only_when_asked(gguf):
    with Model(gguf(vocab="spm-added"), n_ctx=64) as model:
        assert model.tokenize("<|im_start|>", add_special=False, parse_special=True) == [421]
        assert 421 not in model.tokenize("<|im_start|>", add_special=False, parse_special=False)
        assert 423 in model.tokenize("量化", add_special=False, parse_special=False)


def test_bos_is_added_as_the_tokenizer_says(gguf):
    for vocab, first in (("spm", 1), ("llama-bpe", 1), ("qwen2", None), ("smollm", None)):
        with Model(gguf(vocab=vocab), n_ctx=64) as model:
            ids = model.tokenize("好", add_special=True, parse_special=True)
            assert model.adds_bos == (first is not None), vocab
            assert (ids[0] == 1) == (first is not None), vocab

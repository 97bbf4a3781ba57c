"""LLaMA 3's tokenizer.model: the tokens and merges that transformers makes of it, and text cut as tiktoken cuts it."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_meta
from hypothesis import HealthCheck, assume, given, settings
from test_tokenization import PAGE, TEXT

from cnq import vocab
from cnq.convert import convert
from cnq.engine.model import Model
from cnq.errors import UnsupportedVocab
from cnq.to_hf import to_hf
from cnq.vocab import tiktoken as ours
from cnq.vocab.vocab import Kind

N, ROWS = tiny_meta.N_RANKS, tiny_meta.N_LLAMA3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny LLaMA 3 in Meta's layout."""
    folder = tmp_path_factory.mktemp("llama3")
    return tiny_meta.checkpoint(tiny_meta.llama3(folder), folder / "meta", embedding_dim=0, rope_theta=500000.0)


@pytest.fixture(scope="module")
def restored(model, tmp_path_factory) -> Path:
    """The same as a Hugging Face directory."""
    return to_hf(model, tmp_path_factory.mktemp("restored") / "hf").path


@pytest.fixture(scope="module")
def encoding(model):
    """The file, run by tiktoken."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    cuts = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    special = {"<|begin_of_text|>": N, "<|end_of_text|>": N + 1, "<|start_header_id|>": N + 6, "<|eot_id|>": N + 9}
    ranks = load_tiktoken_bpe(str(model / "tokenizer.model"))
    return tiktoken.Encoding("llama3", pat_str=cuts, mergeable_ranks=ranks, special_tokens=special)


def test_tokens_and_merges_are_those_of_transformers(model):
    pytest.importorskip("tiktoken")
    slow = pytest.importorskip("transformers.convert_slow_tokenizer")
    path = str(model / "tokenizer.model")
    tokens, merges = slow.TikTokenConverter(path).extract_vocab_merges_from_model(path)
    found = vocab.load(model, ROWS)
    assert {token: id for id, token in enumerate(found.tokens[:N])} == tokens
    assert found.merges == [" ".join(merge) for merge in merges]


@pytest.mark.parametrize(
    ("scaled_rope", "named", "last"),
    [
        (False, {2: "<|reserved_special_token_0|>", 5: "<|reserved_special_token_3|>", 8: "<|reserved_special_token_4|>",
                 10: "<|reserved_special_token_5|>"}, "<|reserved_special_token_250|>"),
        (True, {3: "<|reserved_special_token_1|>", 4: "<|finetune_right_pad_id|>", 5: "<|reserved_special_token_2|>",
                8: "<|eom_id|>", 10: "<|python_tag|>", 11: "<|reserved_special_token_3|>"}, "<|reserved_special_token_247|>"),
    ],
)  # fmt: skip
def test_special_tokens_are_named_as_the_release_names_them(model, scaled_rope, named, last):
    """Names as in the tokenizer.json of LLaMA 3 and 3.1."""
    found = vocab.load(model, ROWS, scaled_rope=scaled_rope)
    named = named | {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
                     9: "<|eot_id|>", 255: last}  # fmt: skip
    assert {place: found.tokens[N + place] for place in named} == named
    assert set(found.kinds[:N]) == {Kind.NORMAL}
    assert set(found.kinds[N:]) == {Kind.CONTROL}
    assert (found.special, found.add) == ({"bos": N, "eos": N + 1}, {"bos": True, "eos": False})


def test_config_json_tells_the_release(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    for name, config, token in (("3", {}, "<|reserved_special_token_4|>"), ("3.1", {"rope_scaling": scaling}, "<|eom_id|>")):
        hf = tiny_meta.llama3(tmp_path / name, **config)
        assert vocab.load(hf, ROWS).tokens[N + 8] == token


def test_tokenizer_json_counts_before_tokenizer_model(model, restored, tmp_path):
    """Hugging Face's own repositories have both; the names of special tokens stand in the first only."""
    content = json.loads((restored / "tokenizer.json").read_text())
    content["added_tokens"][12]["content"] = "<|our_own|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(model / "tokenizer.model", tmp_path)
    assert vocab.load(tmp_path, ROWS).tokens[N + 12] == "<|our_own|>"


def test_the_tokenizer_json_written_from_it_converts_to_the_same(model, restored):
    want, got = vocab.load(model, ROWS).fields(), vocab.load(restored, ROWS).fields()
    assert got == want
    assert got["tokenizer.ggml.pre"] == "llama-bpe"


def test_llama_cpp_cuts_as_tiktoken(model, encoding, tmp_path):
    path = convert(model, tmp_path / "m.gguf").path
    with Model(path, n_ctx=64) as loaded:
        for text in PAGE:
            assert loaded.tokenize(text, add_special=False, parse_special=False) == encoding.encode_ordinary(text), text
        prompt = "<|start_header_id|>量化<|eot_id|>"
        want = [N, *encoding.encode(prompt, allowed_special="all")]
        assert loaded.tokenize(prompt, add_special=True, parse_special=True) == want


@pytest.fixture(scope="module")
def hf_tokenizer(restored):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(restored)


def test_transformers_cuts_as_tiktoken(hf_tokenizer, encoding):
    for text in PAGE:
        want = encoding.encode(text, allowed_special="all", disallowed_special=())
        assert hf_tokenizer.encode(text) == [N, *want], text
        assert hf_tokenizer.decode(want) == encoding.decode(want)
    assert (hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id) == (N, N + 1)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_transformers_cuts_as_tiktoken_on_any_text(hf_tokenizer, encoding, text):
    assume("<|" not in text)  # a special token, to transformers
    assert hf_tokenizer.encode(text, add_special_tokens=False) == encoding.encode_ordinary(text)


def test_ranks_come_back_to_the_byte(model, restored):
    raw = (model / "tokenizer.model").read_bytes()
    assert ours.dump(vocab.load(model, ROWS)) == raw
    assert ours.dump(vocab.load(restored, ROWS, scaled_rope=True)) == raw


@pytest.mark.parametrize("change", ["a merge less", "another order of merges", "another name", "one special token less"])
def test_no_ranks_are_made_of_what_they_cannot_say(model, change):
    found = vocab.load(model, ROWS)
    match change:
        case "a merge less":
            del found.merges[7]
        case "another order of merges":
            found.merges[3], found.merges[4] = found.merges[4], found.merges[3]
        case "another name":
            found.tokens[N + 20] = "<|im_start|>"
        case "one special token less":
            found.n_tokens -= 1
    assert ours.dump(found) is None


def test_a_newer_models_ranks_are_refused(tmp_path, monkeypatch):
    """LLaMA 4's file looks alike, and its text is cut by another expression."""
    tiny_meta.ranks(tmp_path / "tokenizer.model")
    monkeypatch.setattr(ours, "N_RANKS", N - 1)
    with pytest.raises(UnsupportedVocab, match="400 ranks, LLaMA 3's 399: it is a newer model's"):
        vocab.load(tmp_path, ROWS)

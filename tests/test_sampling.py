"""Drawing tokens, breaking off, and texts of any length: what the servers ask of the engine beyond a terminal chat."""

import json
import threading
import time

import llama_cpp.llama_cpp as lib
import pytest
from llama_cpp.llama_grammar import JSON_GBNF

from cnq.engine.model import Model, Sampling
from cnq.engine.sampler import json_grammar
from cnq.errors import EngineError, Interrupted


@pytest.fixture(scope="module")
def model(gguf):
    with Model(gguf(vocab="spm-added"), n_ctx=512, n_threads=1) as model:
        yield model


PROMPT = list(range(3, 40))


def test_a_grammar_gives_the_tokens_of_llama_cpps_own_chain(model):
    """Ours looks at one token first, llama.cpp's grammar sampler at all of them each time."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_grammar(model._vocab, JSON_GBNF.encode(), b"root"))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
    model._go_on(PROMPT)
    expected = []
    while len(expected) < 60:
        token = int(lib.llama_sampler_sample(chain, model._ctx, -1))
        if model.ends(token):
            break
        expected.append(token)
        model._decode([token], model.n_seen, 1)
    lib.llama_sampler_free(chain)
    assert list(model.generate(PROMPT, Sampling(temperature=0, repeat_penalty=1, grammar=json_grammar(None)), 60)) == expected


@pytest.mark.parametrize("seed", range(4))
def test_json_is_json_at_any_temperature(model, seed):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "量"]}, "b": {"type": "array", "items": {"type": "boolean"},
              "maxItems": 3}}, "required": ["a", "b"]}  # fmt: skip
    sampling = Sampling(temperature=2, top_p=1, top_k=0, seed=seed, grammar=json_grammar(schema))
    text = b"".join(model.piece(t) for t in model.generate(PROMPT, sampling, 400)).decode()
    found = json.loads(text)
    assert found["a"] in ("x", "量") and len(found["b"]) <= 3


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a?){500}(a?){500}$"},
        {"type": "string", "maxLength": 100_000},
        {"type": "array", "items": {"type": "array", "minItems": 10**6}},
        {"anyOf": [{"properties": {"a": {"format": "date"}}}]},
        {"$ref": "https://127.0.0.1/schema.json"},
        {"type": "array", "items": {"type": 7}},
    ],
)
def test_schemas_that_would_end_the_process_or_never_end_are_refused(schema):
    with pytest.raises(EngineError):
        json_grammar(schema)


def test_a_schema_nested_without_end_is_refused():
    deep = {"type": "string"}
    for _ in range(2000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(EngineError, match="nested"):
        json_grammar(deep)


def test_a_grammar_that_no_token_follows_ends_the_answer_with_an_error(model):
    with pytest.raises(EngineError, match="cannot follow"):
        list(model.generate(PROMPT, Sampling(grammar="root ::= nothing"), 5))


def test_penalties_and_biases_move_the_likeliest_token(model):
    first = next(model.generate(PROMPT, Sampling(temperature=0, repeat_penalty=1), 1))
    biased = Sampling(temperature=0, repeat_penalty=1, logit_bias=((first, -100.0), (7, 100.0)))
    assert next(model.generate(PROMPT, biased, 1)) == 7
    seen = [*PROMPT, first]
    likeliest = next(model.generate(seen, Sampling(temperature=0, repeat_penalty=1, logit_bias=((first, 50.0),)), 1))
    assert likeliest == first
    for penalty in ("presence_penalty", "frequency_penalty"):
        sampling = Sampling(temperature=0, repeat_penalty=1, logit_bias=((first, 1e-3),), **{penalty: 1e6})
        assert next(model.generate(seen, sampling, 1)) != first


def test_a_pass_is_broken_off_from_another_thread_and_another_context_goes_on(gguf):
    path = gguf(vocab="spm-added", max_position_embeddings=32768)
    prompt = [5 + i % 300 for i in range(30_000)]
    with Model(path, n_ctx=32768, n_threads=1) as model:
        twin = model.fork()
        threading.Timer(0.2, model.interrupt).start()
        started = time.monotonic()
        with pytest.raises(Interrupted):
            list(model.generate(prompt, Sampling(), 5))
        assert time.monotonic() - started < 5
        assert model.n_seen < len(prompt)
        short = prompt[:700]
        expected = list(twin.generate(short, Sampling(temperature=0), 10))
        with pytest.raises(Interrupted):
            list(model.generate(short, Sampling(temperature=0), 10))
        model.resume()
        assert list(model.generate(short, Sampling(temperature=0), 10)) == expected
        twin.close()


@pytest.mark.parametrize("pre", ["deepseek-llm", "deepseek-v3", "qwen2"])
@pytest.mark.parametrize("text", ["a", "量化", "!?", " ", "\n"])
def test_a_long_word_does_not_overflow_the_stack(gguf, pre, text):
    """std::regex recurses for each character, and 8 MB of stack end at some ten thousand of them."""
    with Model(gguf(vocab=pre), n_ctx=64, n_threads=1) as model:
        long = text * (200_000 // len(text.encode()))
        ids = model.tokenize(long, add_special=False, parse_special=False)
        assert b"".join(model.piece(i) for i in ids).decode() == long

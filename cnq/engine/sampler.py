"""Choosing the next token: llama.cpp's chain of samplers, with a grammar where the answer must be JSON."""

import ctypes
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from ..errors import EngineError

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama.h, struct llama_token_data


@dataclass(frozen=True)
class Sampling:
    """temperature 0 = always the likeliest token. top_k 0, top_p 1, min_p 0, repeat_penalty 1 = off.

    repeat_last_n: how many tokens the three penalties look back. logit_bias: (token, what to add to its logit).
    grammar: GBNF that the answer must follow, see json_grammar.
    """

    temperature: float = 0.2
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    repeat_penalty: float = 1.1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    seed: int = 0xFFFFFFFF  # llama.cpp's word for a random one
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None


class Sampler:
    """What draws the tokens of one answer. Close it."""

    def __init__(self, sampling: Sampling, vocab: object, n_vocab: int, before: Sequence[int]):
        """before: the prompt, for the penalties. Raises EngineError for a grammar that llama.cpp cannot read."""
        self._n_vocab = n_vocab
        self._grammar = None
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for part in _parts(sampling, n_vocab, before):
            lib.llama_sampler_chain_add(self._chain, part)
        if sampling.grammar is not None:
            self._grammar = lib.llama_sampler_init_grammar(vocab, sampling.grammar.encode(), b"root")
            if not self._grammar:
                self.close()
                raise EngineError("llama.cpp cannot follow the grammar made of this JSON schema. Make the schema simpler.")

    def close(self) -> None:
        for sampler in (self._chain, self._grammar):
            if sampler:
                lib.llama_sampler_free(sampler)

    def draw(self, context: Any) -> int:
        """The next token after what the context has computed last."""
        if not self._grammar:
            return int(lib.llama_sampler_sample(self._chain, context, -1))
        # A grammar looks at every token there is, which takes as long as a small model: the token drawn without it is
        # nearly always right already. This is what llama.cpp's own tools do (common/sampling.cpp).
        token = self._draw(self._candidates(context))
        alone = np.array([(token, 1, 0)], _CANDIDATE)
        self._apply(self._grammar, alone)
        if alone["logit"][0] == -np.inf:
            candidates = self._candidates(context)
            self._apply(self._grammar, candidates)
            if candidates["logit"].max() == -np.inf:  # llama.cpp would end the process at the next step
                raise EngineError("the model has no token with which the answer could go on as the JSON schema wants.")
            token = self._draw(candidates)
        lib.llama_sampler_accept(self._chain, token)
        lib.llama_sampler_accept(self._grammar, token)
        return token

    def _candidates(self, context: Any) -> np.ndarray:
        candidates = np.zeros(self._n_vocab, _CANDIDATE)
        candidates["id"] = np.arange(self._n_vocab)
        candidates["logit"] = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (self._n_vocab,))
        return candidates

    def _draw(self, candidates: np.ndarray) -> int:
        return int(candidates["id"][self._apply(self._chain, candidates)])

    def _apply(self, sampler: object, candidates: np.ndarray) -> int:
        """Have a sampler work on candidates in place; the index of the one it selected."""
        pointer = candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
        array = lib.llama_token_data_array(pointer, len(candidates), -1, False)
        lib.llama_sampler_apply(sampler, ctypes.byref(array))
        return int(array.selected)


def _parts(sampling: Sampling, n_vocab: int, before: Sequence[int]) -> list[object]:
    parts = []
    if sampling.logit_bias:
        biases = (lib.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias)
        parts.append(lib.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
    if (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (1, 0, 0):
        penalties = lib.llama_sampler_init_penalties(
            n_vocab, sampling.repeat_last_n, sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
        )
        for token in before[-sampling.repeat_last_n :]:
            lib.llama_sampler_accept(penalties, token)
        parts.append(penalties)
    if sampling.temperature <= 0:
        return [*parts, lib.llama_sampler_init_greedy()]
    return [
        *parts,
        lib.llama_sampler_init_top_k(sampling.top_k),
        lib.llama_sampler_init_top_p(sampling.top_p, 1),
        lib.llama_sampler_init_min_p(sampling.min_p, 1),
        lib.llama_sampler_init_temp(sampling.temperature),
        lib.llama_sampler_init_dist(sampling.seed),
    ]


def json_grammar(schema: dict[str, Any] | None) -> str:
    """GBNF of the JSON that a JSON schema describes; of any JSON object for None.

    Raises EngineError for a schema with which llama-cpp-python's converter, or llama.cpp, would fail.
    """
    from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

    if schema is None:
        return str(JSON_GBNF)
    _require_tame(schema)
    try:
        grammar = str(json_schema_to_gbnf(json.dumps(schema)))
    except Exception as error:  # it asserts, looks up and unpacks what it finds: anything may come out
        raise EngineError(f"the JSON schema cannot be followed: {type(error).__name__} {error}. Make it simpler.") from error
    return re.sub(r"^char ::= .*", lambda _: _CHAR, grammar, flags=re.M)


# Of a string. The converter's rule lets control characters through, JSON does not; this is llama.cpp's grammars/json.gbnf.
_CHAR = r'char ::= [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4})'
_KEYWORDS = {
    "$defs", "$ref", "$schema", "additionalProperties", "allOf", "anyOf", "const", "default", "definitions", "description",
    "enum", "examples", "items", "maxItems", "maxLength", "minItems", "minLength", "oneOf", "prefixItems", "properties",
    "required", "title", "type",
}  # fmt: skip
_MOST = 500  # characters or items: of a few thousand llama.cpp makes a stack overflow
_DEEPEST = 50


def _require_tame(schema: Any, depth: int = 0) -> None:
    """Raise EngineError for what would crash llama.cpp or never end there: long repetitions, regular expressions."""
    if depth > _DEEPEST:
        raise EngineError(f"the JSON schema is nested more than {_DEEPEST} deep. Make it simpler.")
    if isinstance(schema, list):
        for part in schema:
            _require_tame(part, depth + 1)
    if not isinstance(schema, dict):
        return
    if unknown := sorted(schema.keys() - _KEYWORDS):
        raise EngineError(f"the JSON schema says {unknown[0]!r}, which cannot be followed. Leave it away.")
    for word in ("minItems", "maxItems", "minLength", "maxLength"):
        if word in schema and not (isinstance(schema[word], int) and 0 <= schema[word] <= _MOST):
            raise EngineError(f"the JSON schema says {word} = {schema[word]!r}, expected 0 to {_MOST}.")
    for word in ("properties", "$defs", "definitions"):
        for part in dict(schema.get(word) or {}).values():
            _require_tame(part, depth + 1)
    for word in ("items", "prefixItems", "additionalProperties", "allOf", "anyOf", "oneOf"):
        _require_tame(schema.get(word), depth + 1)

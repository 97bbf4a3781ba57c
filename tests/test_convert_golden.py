"""cnq's conversion against manifests written by llama.cpp's own converter (tests/golden/make.py).

Baichuan's are written by that converter after a repair: as it is, it calls itself for ever. What llama.cpp then computes is
held against the model's formulas in test_formulas.py.
"""

import json
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
sys.path.append(str(GOLDEN))

import cases  # noqa: E402

from cnq.convert import convert  # noqa: E402

_IDS = "the tokenizer names the token; the reference looks in tokenizer.json's added tokens and config.json only"
_EOS = "said, because it is known: the post-processor adds no eos"
_SEP = "left out: only BERT-like rerankers have a separator, llama.cpp's default is false"
_SYMBOLS = "user-defined symbols stay what they are, else llama.cpp would try to merge them; the reference calls them normal"
_PREFIX = "left out when it is llama.cpp's default; the reference states it for InternLM2"
_STATED = "stated, as for every family; the reference leaves it out where config.json does"

# Keys in which cnq differs on purpose: case -> key -> reason.
DIFFERENCES: dict[str, dict[str, str]] = {
    **{case: {"tokenizer.ggml.unknown_token_id": _IDS} for case, s in cases.CASES.items() if s["vocab"] == "spm"},
    **{
        case: {"tokenizer.ggml.unknown_token_id": _IDS, "tokenizer.ggml.padding_token_id": _IDS}
        for case, s in cases.CASES.items()
        if s["vocab"] == "spm-added"
    },
    **{
        case: {"tokenizer.ggml.add_eos_token": _EOS, "tokenizer.ggml.add_sep_token": _SEP}
        for case, s in cases.CASES.items()
        if s["vocab"] in ("llama-bpe", "tekken")
    },
    "llama-json-only": {
        "tokenizer.ggml.scores": "the reference gives every token -1000, which loses the order of the merges",
        "tokenizer.ggml.add_sep_token": _SEP,
    },
    "llama-yi": {
        "tokenizer.ggml.token_type": _SYMBOLS,
        "tokenizer.ggml.tokens": 'in them "▁" is a space: llama.cpp looks for them before it writes spaces so',
        "tokenizer.ggml.add_space_prefix": "tokenizer.model puts none; the reference asks tokenizer_config.json only",
        "tokenizer.ggml.unknown_token_id": _IDS,
    },
    "internlm2-f16": {
        "tokenizer.ggml.token_type": _SYMBOLS,
        "tokenizer.ggml.add_space_prefix": _PREFIX,
        "tokenizer.ggml.unknown_token_id": _IDS,
        "tokenizer.ggml.eos_token_id": "the tokenizer's; the reference puts <|im_end|>, where llama.cpp ends a turn anyhow",
    },
    "internlm2-bf16": {"tokenizer.ggml.add_space_prefix": _PREFIX, "tokenizer.ggml.unknown_token_id": _IDS},
    **{
        case: {
            "baichuan.attention.head_count_kv": _STATED,
            "baichuan.rope.freq_base": _STATED,
            "baichuan.tensor_data_layout": "left out: a word about q's and k's rows, which nothing reads",
            "tokenizer.ggml.unknown_token_id": _IDS,
        }
        for case in ("baichuan-7b", "baichuan2-7b")
    },
}
# Tensors in which cnq differs on purpose.
OTHER_TENSORS = {
    "baichuan2-7b": {"output.weight": "rows of length 1, as the model's own code makes them; the reference forgets it"}
}


def manifest(case: str) -> dict:
    return json.loads((GOLDEN / f"{case}.json").read_text())


def different(want: dict, got: dict) -> dict:
    return {key: (want.get(key), got.get(key)) for key in want.keys() | got.keys() if want.get(key) != got.get(key)}


@pytest.mark.parametrize("case", cases.CASES)
def test_every_tensor_is_bit_identical_to_llama_cpp(case, tmp_path):
    """Same names, types, shapes and bytes for each --dtype."""
    pytest.importorskip("tokenizers")
    model = cases.make(case, tmp_path)
    for outtype, want in manifest(case)["outtypes"].items():
        converted = convert(model, tmp_path / f"{outtype}.gguf", dtype=outtype)
        wrong = different(want, cases.fingerprint(converted.path)["tensors"])
        known = OTHER_TENSORS.get(case, {}).keys()
        assert wrong.keys() == known, f"{outtype}: name -> (llama.cpp, cnq): {wrong}, known: {known}"


@pytest.mark.parametrize("case", cases.CASES)
def test_every_key_equals_llama_cpp(case, tmp_path):
    pytest.importorskip("tokenizers")
    golden = manifest(case)
    converted = convert(cases.make(case, tmp_path), tmp_path / "f16.gguf", dtype="f16")
    known = DIFFERENCES.get(case, {})
    wrong = different(golden["keys"], cases.fingerprint(converted.path)["keys"])
    unexpected = {key: pair for key, pair in wrong.items() if key not in known}
    assert not unexpected, f"key -> (llama.cpp, cnq): {unexpected}"
    assert not (stale := known.keys() - wrong.keys()), f"listed as different, but equal: {stale}"

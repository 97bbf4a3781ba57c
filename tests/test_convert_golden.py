"""cnq's conversion against manifests written by llama.cpp's own converter (tests/golden/make.py)."""

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
        if s["vocab"] == "llama-bpe"
    },
    "llama-json-only": {
        "tokenizer.ggml.scores": "the reference gives every token -1000, which loses the order of the merges",
        "tokenizer.ggml.add_sep_token": _SEP,
    },
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
        assert not wrong, f"{outtype}: name -> (llama.cpp, cnq): {wrong}"


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

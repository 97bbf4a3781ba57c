"""tokenizer.json against SentencePiece, on every short text of vocabularies in which no two scores are equal."""

from itertools import product

import pytest
import spm
from hypothesis import given, settings
from hypothesis import strategies as st

from training.hf_tokenizer import cut_otherwise

pytest.importorskip("tokenizers")

LETTERS = "ab中"
SPACES = {"▁" * n: -1e9 for n in range(1, 6)}  # as LLaMA has them: runs of spaces are joined last, and all scores are equal
VOCABULARY = st.lists(st.text(f"{LETTERS}▁", min_size=2, max_size=4).filter(lambda t: t.strip("▁")), max_size=9, unique=True)
EVERY_TEXT = ["".join(text) for n in range(1, 7) for text in product(f"{LETTERS} ", repeat=n)]


@settings(max_examples=40, deadline=None)
@given(pieces=VOCABULARY)
def test_texts_are_cut_alike(pieces):
    model = spm.bpe({**{text: -float(i) for i, text in enumerate(pieces)}, **dict.fromkeys(LETTERS, -100.0), **SPACES})
    assert cut_otherwise(model, EVERY_TEXT) == 0


def test_lines_that_are_cut_otherwise_are_counted():
    model = spm.bpe({"ab": 0.0, "ba": 0.0, **dict.fromkeys("ab▁", -100.0)})
    assert cut_otherwise(model, ["aba", "bab", "ab", "", "中"]) == 1  # of "ba" and "ab", one is wherever it comes first

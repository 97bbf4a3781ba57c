"""Tokenizers of every kind as transformers loads them, made once a run."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import spm
import tiny

# transformers' LlamaTokenizer, our tokenizer.json of the same pieces, and byte-level BPE: with and without a bos of its own
KINDS = ("spm-added", "spm-ours", "llama-bpe", "qwen2")


@functools.cache
def tokenizer(kind: str) -> Any:
    from transformers import AutoTokenizer

    from training import hf_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "spm-ours":
            hf_tokenizer.write(spm.llama(folder), folder)
        else:
            tiny.tokenizer(folder, kind)
        return AutoTokenizer.from_pretrained(folder)


def text_between(tokenizer: Any, ids: list[int], begin: int, end: int) -> str:
    """What ids[begin:end] add to the text of those before them: a tokenizer may drop a space where a text begins."""
    before, whole = (tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in (begin, end))
    assert whole.startswith(before)
    return whole[len(before) :]


def runs(flags: list[bool]) -> list[tuple[int, int]]:
    """(begin, end) of each stretch of True."""
    edges = [i for i in range(len(flags) + 1) if (i < len(flags) and flags[i]) != (i > 0 and flags[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))

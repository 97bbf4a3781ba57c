"""From a tokenizer's files to what a GGUF says of it, and back."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from ..archs.hparams import rope
from ..errors import UnsupportedVocab, VocabMismatch, listed
from . import bpe, spm, tiktoken
from .special import add_special, read
from .vocab import Kind, Vocab

__all__ = ["Vocab", "load", "write"]

# What reading files of another form than a tokenizer's ends in; the chain of errors tells where.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
# Other forms of a tokenizer, and why they are not enough.
_OTHER_FORMS = {
    "vocab.json": " (vocab.json and merges.txt do not say how text is cut)",
    "tekken.json": " (tekken.json is Mistral's own form, which cnq does not read)",
}


def load(folder: Path, rows: int, *, scaled_rope: bool | None = None) -> Vocab:
    """The tokenizer of a model directory, for an embedding of `rows` rows.

    scaled_rope: whether a LLaMA 3 is 3.1 or later, which LLaMA 3's tokenizer.model leaves open; None = as config.json says.
    Raises UnsupportedVocab (no tokenizer, or none that llama.cpp has), VocabMismatch (tokenizer of another model).
    """
    try:
        vocab = _load(folder, rows, scaled_rope)
        # JSON can say tokens that are no text, and text that has no UTF-8 (a lone surrogate)
        "".join([*vocab.tokens, *(vocab.merges or ()), json.dumps(vocab.chat_template, ensure_ascii=False)]).encode()
    except _MALFORMED as error:
        raise UnsupportedVocab(
            f"{folder}: the tokenizer's files are not in order ({type(error).__name__}: {error}). "
            "Take them from the model's own repository."
        ) from error
    return vocab


def _load(folder: Path, rows: int, scaled_rope: bool | None) -> Vocab:
    tokenizer = read(folder / "tokenizer.json")
    model = folder / "tokenizer.model"
    ranks = model.is_file() and tiktoken.is_ranks(model)
    if model.is_file() and not ranks:
        vocab = spm.load_model(folder, rows)
    elif ranks and not tokenizer:  # tokenizer.json says the same and more
        if scaled_rope is None:
            scaled_rope = rope(read(folder / "config.json"))["rope_type"] == "llama3"
        vocab = tiktoken.load(model, rows, scaled_rope)
    elif not tokenizer:
        found = next((why for name, why in _OTHER_FORMS.items() if (folder / name).is_file()), "")
        raise UnsupportedVocab(
            f"{folder} has neither tokenizer.model nor tokenizer.json{found}. Take them from the model's own repository."
        )
    elif spm.is_sentencepiece_json(tokenizer):
        vocab = spm.load_json(folder, rows)
    else:
        vocab = bpe.load(folder, rows)
    _compare(folder, vocab, rows)
    add_special(vocab, folder)
    return vocab


def _compare(folder: Path, vocab: Vocab, rows: int) -> None:
    """Tokens and embedding rows must agree, one to one; rows may only be more by padding to a round number."""
    if vocab.n_tokens > rows:
        raise VocabMismatch(
            f"{folder}: the tokenizer has {vocab.n_tokens} tokens, the embedding {rows} rows. A LoRA that extends the "
            "vocabulary must be merged first (python -m training.merge_lora BASE LORA OUT); "
            f"or the tokenizer is another model's: take the one with {rows} tokens."
        )
    if double := [token for token, n in Counter(vocab.tokens).items() if n > 1]:
        raise UnsupportedVocab(
            f"{folder}: several ids for one token ({listed(map(repr, double))}), which llama.cpp aborts at. "
            "Take the tokenizer from the model's own repository."
        )
    spare = rows - vocab.n_tokens
    if spare and (rows % 8 or spare > rows // 20):
        raise VocabMismatch(
            f"{folder}: the tokenizer has {vocab.n_tokens} tokens, the embedding {rows} rows, too many for padding. "
            "The tokenizer is another model's (LLaMA 32000, Chinese-LLaMA 49953, Chinese-Alpaca 49954, "
            f"Chinese-LLaMA-2 55296, LLaMA-3 128256): take the one with {rows} tokens."
        )
    if spare:
        vocab.notes.append(f"{spare} of {rows} embedding rows belong to no token: padding")


def write(fields: dict[str, Any], folder: Path, sentencepiece: Path | None = None) -> None:
    """Write the tokenizer of a GGUF's metadata as Hugging Face files: same tokens, ids, kinds, special tokens, template.

    sentencepiece: the tokenizer.model they were read from, to be taken as it is.
    Raises UnsupportedVocab.
    """
    model = fields.get("tokenizer.ggml.model")
    if model not in ("llama", "gpt2") or "tokenizer.ggml.token_type" not in fields:
        raise UnsupportedVocab(f"the GGUF's tokenizer is of type {model!r}; cnq can write llama and gpt2.")
    try:
        _write(fields, folder, sentencepiece)
    except _MALFORMED as error:
        raise UnsupportedVocab(
            f"the GGUF's tokenizer is not in order ({type(error).__name__}: {error}). Download or make the GGUF again."
        ) from error


def _write(fields: dict[str, Any], folder: Path, sentencepiece: Path | None) -> None:
    model, tokens = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.tokens"]
    # some converters write -1, or 2**32 - 1, for "none"
    none = [k for k, id in fields.items() if k.endswith("_token_id") and not (type(id) is int and 0 <= id < len(tokens))]
    fields = {key: value for key, value in fields.items() if key not in none}
    if sentencepiece:
        shutil.copyfile(sentencepiece, folder / "tokenizer.model")
    else:
        (spm.write if model == "llama" else bpe.write)(fields, folder)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
    config: dict[str, Any] = {
        f"{name}_token": tokens[fields[key]]
        for name, gguf in names.items()
        if (key := f"tokenizer.ggml.{gguf}_token_id") in fields
    }
    for name in ("bos", "eos"):
        if (key := f"tokenizer.ggml.add_{name}_token") in fields:
            config[f"add_{name}_token"] = fields[key]
    if "tokenizer.ggml.add_space_prefix" in fields:
        config["add_prefix_space"] = fields["tokenizer.ggml.add_space_prefix"]
    config["clean_up_tokenization_spaces"] = False
    config["tokenizer_class"] = "LlamaTokenizer" if model == "llama" else "PreTrainedTokenizerFast"
    if model == "llama":
        config["legacy"] = True
        config["added_tokens_decoder"] = {
            str(id): {
                "content": token,
                "special": kind == Kind.CONTROL,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
            for id, (token, kind, score) in enumerate(
                zip(tokens, fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.scores"], strict=True)
            )
            if kind in (Kind.CONTROL, Kind.USER_DEFINED) and score == spm.ADDED_SCORE
        }
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")

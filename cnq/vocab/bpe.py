"""Byte-level BPE vocabularies (tokenizer.json), and how llama.cpp calls the way they cut text into words."""

import json
from pathlib import Path
from typing import Any

from ..errors import UnsupportedVocab
from .special import read
from .vocab import Kind, Vocab, added_kind, placeholder

# The pre-tokenizer is recognised by what it does: the regular expressions that cut the text, in order. (llama.cpp's own
# converter hashes the tokens of a test string, so a vocabulary with one more Chinese token is unknown to it.)
# Expressions: llama.cpp src/llama-vocab.cpp, llm_tokenizer_bpe; it writes (?i:'s|…) as (?:'[sS]|…).

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel uses by itself
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"  # what Digits stands for


def _gpt4(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_DEEPSEEK_LLM = (
    "[\r\n]",
    # the cased letters of the scripts that have case; escaped, since editors turn U+212A into a plain K
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    r"""[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)

# Mistral's since Nemo
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (expressions, whether a word that is a token skips the merges) -> tokenizer.ggml.pre
_PRE = {
    ((_gpt4("{1,3}"),), True): "llama-bpe",
    ((_gpt4("{1,3}"),), False): "smaug-bpe",  # LLaMA 3's expression, merges always followed
    ((_gpt4(""),), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_TEKKEN,), False): "tekken",  # llama.cpp skips the merges all the same, as does Mistral's own tokenizer
    ((_DIGIT, _GPT2), False): "smollm",  # also StarCoder's and Command-R's: the same expressions under other names
    ((_GPT2,), False): "gpt-2",
    ((*_DEEPSEEK_LLM, _DIGITS), False): "deepseek-llm",
    ((*_DEEPSEEK_LLM, _DIGIT), False): "deepseek-llm",  # its vocabulary has no token of several digits
    (("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT), False): "deepseek-coder",
    (_DEEPSEEK_V3, False): "deepseek-v3",
}


def load(folder: Path, rows: int) -> Vocab:
    """tokenizer.json as llama.cpp's "gpt2" tokenizer, one token for each of the embedding's `rows`.

    Raises UnsupportedVocab when llama.cpp would cut or merge text differently.
    """
    path = folder / "tokenizer.json"
    tokenizer = read(path)
    model = tokenizer.get("model", {})
    pre = pre_tokenizer(path, tokenizer)
    vocab = Vocab(
        model="gpt2",
        pre=pre,
        tokens=[placeholder(id) for id in range(rows)],
        kinds=[Kind.UNUSED] * rows,
        merges=[_merge(m) for m in model["merges"]],
    )
    for text, id in model["vocab"].items():
        _set(vocab, id, text, Kind.NORMAL, rows)
    for entry in tokenizer.get("added_tokens", []):
        _set(vocab, entry["id"], *added_kind(entry["content"], entry), rows)
    flag = read(folder / "tokenizer_config.json").get("add_prefix_space")
    vocab.add_space_prefix = flag if isinstance(flag, bool) else None
    if pre == "tekken":
        vocab.notes.append(
            "llama.cpp cuts words at capitals of A-Z only, the tokenizer at any: text in accented Latin, Greek or Cyrillic "
            "letters of mixed case, or with combining marks, may get other tokens"
        )
    if normalizer := (tokenizer.get("normalizer") or {}).get("type"):
        vocab.notes.append(f"the tokenizer normalizes text ({normalizer}), llama.cpp does not: composed characters only matter")
    return vocab


def pre_tokenizer(path: Path, tokenizer: dict[str, Any]) -> str:
    """tokenizer.ggml.pre for a tokenizer.json. Raises UnsupportedVocab naming what was found."""
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE":
        raise UnsupportedVocab(
            f"{path} is of type {model.get('type')}; llama.cpp runs BPE and SentencePiece vocabularies of these families."
        )
    if (tokenizer.get("decoder") or {}).get("type") != "ByteLevel":
        raise UnsupportedVocab(f"{path} is BPE but not over bytes, and has no byte fallback: llama.cpp has no such tokenizer.")
    cuts = tuple(_cuts(path, tokenizer.get("pre_tokenizer") or {}))
    skips = bool(model.get("ignore_merges"))
    if pre := _PRE.get((cuts, skips)):
        return pre
    raise UnsupportedVocab(
        f"{path}: llama.cpp has no pre-tokenizer that cuts by {list(cuts)} with ignore_merges = {skips}; known are "
        f"{', '.join(sorted(set(_PRE.values())))}. A wrong one makes the model worse than any quantization: not converted."
    )


def _cuts(path: Path, step: dict[str, Any]) -> list[str]:
    """The regular expressions that a pre-tokenizer cuts by, in order."""
    match step.get("type"):
        case "Sequence":
            return [cut for inner in step["pretokenizers"] for cut in _cuts(path, inner)]
        case "Split" if step["behavior"] == "Isolated" and not step.get("invert"):
            return [_plain(step["pattern"].get("Regex", ""))]
        case "Split" if step["behavior"] == "Removed" and step.get("invert"):  # keep the matches: the same, when all matches
            return [_plain(step["pattern"].get("Regex", ""))]
        case "Digits":
            return [_DIGIT if step["individual_digits"] else _DIGITS]
        case "ByteLevel" if not step.get("add_prefix_space"):
            return [_GPT2] if step.get("use_regex", True) else []
    shown = json.dumps(step, ensure_ascii=False)[:200] or "none"
    raise UnsupportedVocab(f"{path}: pre-tokenizer {shown} has no counterpart in llama.cpp. Not converted.")


def _plain(expression: str) -> str:
    return expression.replace(r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)")


def _merge(merge: str | list[str]) -> str:
    """ "left right"; a space within a part, which newer files allow, in the byte alphabet's spelling."""
    return merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge)


def _set(vocab: Vocab, id: int, text: str, kind: Kind, rows: int) -> None:
    if vocab.has_row(id, rows):
        vocab.set(id, text, kind, 0.0)


# Back to files


def write(fields: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json from a GGUF's metadata. Raises UnsupportedVocab for a pre-tokenizer not known here."""
    pre = fields.get("tokenizer.ggml.pre", "")
    found = next(((cuts, skips) for (cuts, skips), name in _PRE.items() if name == pre), None)
    if found is None:
        raise UnsupportedVocab(
            f"tokenizer.ggml.pre is {pre!r}; cnq can write {', '.join(sorted(set(_PRE.values())))}. "
            "Take tokenizer.json from the model's own repository."
        )
    cuts, skips = found
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    added = [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == Kind.CONTROL,
        }
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (Kind.CONTROL, Kind.USER_DEFINED)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in cuts]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": _post_processor(fields, tokens),
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": skips,
            "vocab": {token: id for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != Kind.UNUSED},
            "merges": [m.split(" ", 1) for m in fields["tokenizer.ggml.merges"]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _post_processor(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What puts bos and eos around a text."""
    ends = {}
    for name in ("bos", "eos"):
        # llama.cpp adds bos for these pre-tokenizers when the file does not say
        default = name == "bos" and fields.get("tokenizer.ggml.pre") in ("llama-bpe", "tekken")
        if fields.get(f"tokenizer.ggml.add_{name}_token", default):
            ends[name] = fields[f"tokenizer.ggml.{name}_token_id"]
    if not ends:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}

    def around(*sequences: dict[str, Any]) -> list[dict[str, Any]]:
        special = {name: {"SpecialToken": {"id": tokens[id], "type_id": 0}} for name, id in ends.items()}
        return [*([special["bos"]] if "bos" in ends else []), *sequences, *([special["eos"]] if "eos" in ends else [])]

    a, b = ({"Sequence": {"id": letter, "type_id": n}} for n, letter in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": around(a),
        "pair": [*around(a), *around(b)],
        "special_tokens": {tokens[id]: {"id": tokens[id], "ids": [id], "tokens": [tokens[id]]} for id in ends.values()},
    }

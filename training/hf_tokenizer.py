"""A SentencePiece BPE model as Hugging Face's files: tokenizer.json and what goes with it.

transformers 5 reads tokenizer.model as if the scores were the ids, and its LlamaTokenizer puts no space before a text that
begins with one. tokenizer.json says both right, and PreTrainedTokenizerFast takes it as it is.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from cnq.vocab.special import read
from cnq.vocab.vocab import Kind

from .pieces import SPACE, Model

FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_CARRIED = ("add_bos_token", "add_eos_token", "model_max_length", "padding_side", "chat_template")


def write(model: Model, folder: Path, base: Path | None = None) -> None:
    """Write the files to `folder`.

    base: the directory of the tokenizer that was extended; its chat template, its pad token and whether encoding adds bos
    and eos are taken over. Without one: bos yes, eos no, as LLaMA.
    """
    config = _config(model, read(base / "tokenizer_config.json") if base else {})
    (folder / "tokenizer.model").write_bytes(model.SerializeToString(deterministic=True))
    _dump(folder / "tokenizer.json", tokenizer_json(model, config["add_bos_token"], config["add_eos_token"]), indent=None)
    _dump(folder / "tokenizer_config.json", config)
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    _dump(folder / "special_tokens_map.json", {name: config[name] for name in names if name in config})
    if base and (base / "chat_template.jinja").is_file():
        shutil.copyfile(base / "chat_template.jinja", folder / "chat_template.jinja")


def _dump(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent), encoding="utf-8")


def _config(model: Model, base: dict[str, Any]) -> dict[str, Any]:
    controls = {i: p.piece for i, p in enumerate(model.pieces) if p.type in (Kind.CONTROL, Kind.UNKNOWN)}
    config: dict[str, Any] = {"add_bos_token": True, "add_eos_token": False}
    config |= {key: base[key] for key in _CARRIED if key in base}
    for name in ("bos", "eos", "unk", "pad"):
        if (id := getattr(model.trainer_spec, f"{name}_id")) in controls:
            config[f"{name}_token"] = controls[id]
    pad = base.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if "pad_token" not in config and any(pad == p.piece for p in model.pieces):
        config["pad_token"] = pad
    named = {config.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    if more := [text for text in controls.values() if text not in named]:
        config["additional_special_tokens"] = more
    config |= {
        "added_tokens_decoder": {str(id): _added(text, True) for id, text in controls.items()},
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return config


def _added(text: str, special: bool) -> dict[str, Any]:
    return {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}


def tokenizer_json(model: Model, add_bos: bool = True, add_eos: bool = False) -> dict[str, Any]:
    """The model as the tokenizers package has it: it joins by the order of its merges, so they stand in order of the scores.

    Of equal scores the pair with the longer left part comes first, which is how a run of spaces grows from the left. Other
    ties cannot be said: SentencePiece joins the leftmost, tokenizers the earlier merge.
    """
    prefix = model.normalizer_spec.add_dummy_prefix
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, **_added(p.piece, p.type != Kind.USER_DEFINED)}
            for i, p in enumerate(model.pieces)
            if p.type in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), spaces],
        },
        "pre_tokenizer": None,
        "post_processor": _post_processor(model, add_bos, add_eos),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {p.piece: i for i, p in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def cut_otherwise(model: Model, lines: Iterable[str]) -> int:
    """How many lines tokenizer.json cuts into other tokens than tokenizer.model does; special tokens are read as text."""
    from tokenizers import Tokenizer

    encoder = SentencePieceProcessor(model_proto=model.SerializeToString())
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(model)))
    tokenizer.encode_special_tokens = True
    lines = [line for line in lines if line]  # before nothing SentencePiece puts no space
    theirs = tokenizer.encode_batch(lines, add_special_tokens=False)
    return sum(a != b.ids for a, b in zip(encoder.encode(lines), theirs, strict=True))


def _merges(model: Model) -> list[tuple[str, str]]:
    pieces = {p.piece: (p.score, -i) for i, p in enumerate(model.pieces) if p.type in (Kind.NORMAL, Kind.USER_DEFINED)}
    merges = [
        (score, cut, len(text), earlier, text[:cut], text[cut:])
        for text, (score, earlier) in pieces.items()
        for cut in range(1, len(text))
        if text[:cut] in pieces and text[cut:] in pieces
    ]
    merges.sort(reverse=True)
    return [(left, right) for *_, left, right in merges]


def _post_processor(model: Model, add_bos: bool, add_eos: bool) -> dict[str, Any]:
    """bos before and eos behind each text, as asked."""
    bos, eos = (
        [{"SpecialToken": {"id": model.pieces[id].piece, "type_id": 0}}] if wanted and id >= 0 else []
        for wanted, id in ((add_bos, model.trainer_spec.bos_id), (add_eos, model.trainer_spec.eos_id))
    )
    special = {
        token["SpecialToken"]["id"]: id
        for tokens, id in ((bos, model.trainer_spec.bos_id), (eos, model.trainer_spec.eos_id))
        for token in tokens
    }

    def sequence(id: str, type_id: int) -> list[dict[str, Any]]:
        return [*bos, {"Sequence": {"id": id, "type_id": type_id}}, *eos]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]} for text, id in special.items()},
    }

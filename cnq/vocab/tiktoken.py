"""LLaMA 3's tokenizer.model: a line of base64 token and rank for each token of a byte-level BPE, special tokens not among them.

Source of the special tokens' names: Llama3Converter in transformers' convert_llama_weights_to_hf.py.
"""

import base64
import re
from pathlib import Path

from ..errors import UnsupportedVocab, listed
from .vocab import Kind, Vocab, placeholder

N_RANKS, N_SPECIAL = 128_000, 256
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
_NAMED = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
_NAMED_SINCE_3_1 = _NAMED | {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}


def is_ranks(path: Path) -> bool:
    """Whether a tokenizer.model is of this kind; SentencePiece's begins with other bytes."""
    with path.open("rb") as f:
        return _LINE.match(f.read(256)) is not None


def special_tokens(scaled_rope: bool) -> list[str]:
    """The 256 that follow the ranks; the nameless are numbered. LLaMA 3.1, which scales rope, gave three more a name."""
    named = _NAMED_SINCE_3_1 if scaled_rope else _NAMED
    numbers = iter(range(N_SPECIAL))
    return [named.get(place) or f"<|reserved_special_token_{next(numbers)}|>" for place in range(N_SPECIAL)]


def load(path: Path, rows: int, scaled_rope: bool) -> Vocab:
    """The file as llama.cpp's "gpt2" tokenizer, one token for each of the embedding's `rows`.

    scaled_rope: as of special_tokens. Raises UnsupportedVocab.
    """
    ranks = _read(path)
    n = len(ranks)
    vocab = Vocab(
        model="gpt2",
        pre="llama-bpe",
        tokens=[placeholder(id) for id in range(rows)],
        kinds=[Kind.UNUSED] * rows,
        merges=_merges(ranks),
        special={"bos": n, "eos": n + 1},
        add={"bos": True, "eos": False},
    )
    texts = [(_spelt(token), rank, Kind.NORMAL) for token, rank in ranks.items()]
    texts += [(token, n + place, Kind.CONTROL) for place, token in enumerate(special_tokens(scaled_rope))]
    for text, id, kind in texts:
        if vocab.has_row(id, rows):
            vocab.set(id, text, kind, 0.0)
    return vocab


def dump(vocab: Vocab) -> bytes | None:
    """The file that `load` makes the vocabulary of, None when there is none."""
    kinds = vocab.kinds[: vocab.n_tokens]
    n = vocab.n_tokens - N_SPECIAL
    if vocab.model != "gpt2" or vocab.pre != "llama-bpe" or kinds != [Kind.NORMAL] * n + [Kind.CONTROL] * N_SPECIAL:
        return None
    if vocab.tokens[n : n + N_SPECIAL] not in (special_tokens(False), special_tokens(True)):
        return None
    alphabet = {char: byte for byte, char in _ALPHABET.items()}
    try:
        ranks = {bytes(alphabet[ord(char)] for char in token): id for id, token in enumerate(vocab.tokens[:n])}
    except KeyError:
        return None
    if _merges(ranks) != vocab.merges:
        return None
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def _read(path: Path) -> dict[bytes, int]:
    lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if len(ranks) < len(lines) or sorted(ranks.values()) != list(range(len(lines))):
        raise UnsupportedVocab(
            f"{path}: {len(lines)} lines with {len(ranks)} tokens and {len(set(ranks.values()))} ranks, expected each once, "
            "from 0 on. Take the tokenizer from the model's own repository."
        )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UnsupportedVocab(
            f"{path} has no token for the bytes {listed(map(str, missing))}: it is cut short. Download it again."
        )
    if len(ranks) > N_RANKS:
        raise UnsupportedVocab(
            f"{path} has {len(ranks)} ranks, LLaMA 3's {N_RANKS}: it is a newer model's, and does not say how text is cut. "
            "Use the tokenizer.json of the model's Hugging Face repository."
        )
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[str]:
    """Every pair of tokens that makes a token, by the rank of what it makes, then of its parts.

    tiktoken joins the two neighbours whose result has the lowest rank, however that result is cut in two: so no pair may
    be left out. The order is that of TikTokenConverter in transformers' convert_slow_tokenizer.py.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [
            (ranks[token[:cut]], ranks[token[cut:]], cut)
            for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        ]
        merges += [f"{_spelt(token[:cut])} {_spelt(token[cut:])}" for _, _, cut in sorted(pairs)]
    return merges


def _alphabet() -> dict[int, int]:
    """Byte -> the character that stands for it: itself when it is printable in Latin-1, else the next from U+0100 on.

    Source: bytes_to_unicode in src/encoder.py of GPT-2.
    """
    others = iter(range(0x100, 0x200))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return {byte: byte if byte in printable else next(others) for byte in range(256)}


_ALPHABET = _alphabet()


def _spelt(token: bytes) -> str:
    return token.decode("latin-1").translate(_ALPHABET)

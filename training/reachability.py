"""Which pieces no text is ever cut into, and which pieces are missing for them.

SentencePiece and llama.cpp cut text alike: of all neighbours whose concatenation is a piece, those of the highest score are
joined first, the leftmost of equals, until nothing joins. What happens inside a stretch of text therefore depends on the
stretch alone, as long as nothing joins across its ends. So a piece is produced somewhere if and only if its own text, with
characters on both sides that join with nothing, is cut into that one piece: the encoder decides exactly.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

from sentencepiece import SentencePieceProcessor

from cnq.vocab.vocab import Kind

from .pieces import SPACE, Model, lowest_score


def unproduced(model: Model) -> list[str]:
    """The pieces of text that the encoder never produces, in the order of their ids."""
    encoder = SentencePieceProcessor(model_proto=model.SerializeToString())
    ids = [i for i, p in enumerate(model.pieces) if p.type == Kind.NORMAL]
    wall = _outside(model)
    cut = encoder.encode([wall + model.pieces[i].piece.replace(SPACE, " ") + wall for i in ids])
    return [model.pieces[i].piece for i, found in zip(ids, cut, strict=True) if i not in found]


def _outside(model: Model) -> str:
    """A character that occurs in no piece, so that nothing joins with it."""
    used = set().union(*(p.piece for p in model.pieces))
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)


def without_split(model: Model, texts: Iterable[str]) -> list[str]:
    """Those of the texts that are not, whatever joins first, made of two pieces which can be made in their turn.

    No order of the scores helps these; the others may still be unproduced, for what joins first. Of the characters, those
    that are pieces can be made: SentencePiece and llama.cpp join others as well, transformers does not.
    """
    pieces = {p.piece for p in model.pieces if p.type == Kind.NORMAL}

    @cache
    def made(text: str) -> bool:
        return text in pieces and (len(text) == 1 or any(made(text[:cut]) and made(text[cut:]) for cut in range(1, len(text))))

    return [text for text in texts if not made(text)]


def intermediates(model: Model, dead: Sequence[str]) -> list[str]:
    """Few pieces which, appended to the model in this order with scores "after", let every one of `dead` be produced.

    These join last, when the text is cut as it would be without them: they only ever shorten the cut, and no piece that was
    produced before is lost. Each time it is the pair of neighbours that completes the most dead pieces; of
    equals the one in the most of them, then the most frequent one in the vocabulary, then the last in code point order. In
    the end those that can be spared go again.
    """
    scores = {p.piece: p.score for p in model.pieces if p.type == Kind.NORMAL}
    lowest = lowest_score(model)
    frequency = cache("\n".join(scores).count)
    cuts = {text: _cut(text, scores) for text in dead}
    pairs = _Pairs(cuts)
    found: list[str] = []
    while pairs.holders:
        best = max(pairs.holders, key=lambda pair: (pairs.completes[pair], len(pairs.holders[pair]), frequency(pair), pair))
        found.append(best)
        scores[best] = lowest - len(found)
        for text in pairs.holders[best].copy():
            pairs.remove(text, cuts[text])
            cuts[text] = _cut(cuts[text], scores)
            pairs.add(text, cuts[text])
    return _indispensable(found, dead, scores)


def _indispensable(found: list[str], dead: Sequence[str], scores: dict[str, float]) -> list[str]:
    """Those of `found` without which a piece of `dead`, or another one that stays, would not be produced."""
    kept = list(found)
    for text in found:
        rest = {t: score for t, score in scores.items() if t != text}
        if all(len(_cut(t, rest)) == 1 for t in (*dead, *kept) if text in t and t != text):
            kept.remove(text)
            scores = rest
    return kept


class _Pairs:
    """The neighbours in the cuts of pieces that are not whole yet.

    holders: two neighbours as one text -> the pieces whose cut has them. completes: -> how many of those have but a third.
    """

    def __init__(self, cuts: dict[str, list[str]]):
        self.holders: dict[str, set[str]] = defaultdict(set)
        self.completes: Counter[str] = Counter()
        for text, symbols in cuts.items():
            self.add(text, symbols)

    def add(self, text: str, symbols: list[str]) -> None:
        for pair in {a + b for a, b in pairwise(symbols)}:
            self.holders[pair].add(text)
            self.completes[pair] += len(symbols) == 3

    def remove(self, text: str, symbols: list[str]) -> None:
        for pair in {a + b for a, b in pairwise(symbols)}:
            self.holders[pair].remove(text)
            self.completes[pair] -= len(symbols) == 3
            if not self.holders[pair]:
                del self.holders[pair]


def _cut(symbols: Iterable[str], scores: dict[str, float]) -> list[str]:
    """Join neighbours by score until nothing joins, as SentencePiece does; slow, for texts as short as a piece."""
    cut = list(symbols)
    while True:
        joins = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(cut)) if a + b in scores]
        if not joins:
            return cut
        at = -max(joins)[1]
        cut[at : at + 2] = [cut[at] + cut[at + 1]]

"""LLaMA's vocabulary and Chinese ones made into one, with an account of the pieces that no text is cut into."""

from collections.abc import Sequence
from dataclasses import dataclass

from cnq.errors import CnqError, UnsupportedVocab, listed
from cnq.vocab.vocab import Kind

from .pieces import Model, appended, missing_characters, new_characters, new_pieces
from .reachability import intermediates, unproduced, without_split

UNREACHABLE = ("keep", "add", "drop")


@dataclass(frozen=True)
class Account:
    """What became of the pieces.

    new: how many were taken over. added: those in between, for want of which others would never be produced. dropped: those
    that never would be. unproduced: new ones that are in the model, and no text is cut into.
    without_split: how many new pieces were dead for want of pieces in between; another order of joining saves the others.
    lost: pieces of the base that were produced before the merge, and are no more.
    """

    new: int
    added: tuple[str, ...]
    dropped: tuple[str, ...]
    unproduced: tuple[str, ...]
    without_split: int
    lost: tuple[str, ...]


def merge(
    base: Model,
    sources: Sequence[Model],
    *,
    characters: bool = False,
    scores: str = "after",
    unreachable: str = "keep",
    controls: Sequence[str] = (),
    pad: str | None = None,
) -> tuple[Model, Account]:
    """Append to the base what the sources have more, in their order, then characters, then control pieces.

    characters: every CJK unified ideograph (U+4E00 to U+9FFF) that is no piece yet.
    scores: see pieces.appended. controls, pad: special tokens; pad comes last.
    unreachable: what becomes of pieces that no text is cut into: "keep" their ids, "add" the pieces missing in between, or
    "drop" them, which changes the cut of no text.
    Raises CnqError when nothing is new, UnsupportedVocab for a special token that text could turn into.
    """
    texts = new_pieces(base, sources)
    if characters:
        texts += new_characters({p.piece for p in base.pieces} | set(texts))
    if not texts and not controls and not pad:
        raise CnqError(
            "nothing to add: the first tokenizer has every piece of the others. Name them in this order: LLaMA, Chinese."
        )
    model = appended(base, texts, scores)
    always = set(unproduced(base))
    dead = [text for text in unproduced(model) if text not in always]
    new = set(texts)
    split = without_split(model, (text for text in dead if text in new))
    added: list[str] = []
    dropped: list[str] = []
    if unreachable == "add":
        added = missing_characters(model)
        model = appended(model, added)
        more = intermediates(model, dead)
        model = appended(model, more)
        added += more
    elif unreachable == "drop":
        dropped = [text for text in dead if text in new]
        gone = set(dropped)
        texts = [text for text in texts if text not in gone]
        model = appended(base, texts, scores)
    left = [text for text in unproduced(model) if text not in always]
    if unreachable == "add" and left:
        raise CnqError(f"{len(left)} pieces are never produced whatever is added: {listed(left)}. Use --unreachable drop.")
    account = Account(
        new=len(texts),
        added=tuple(added),
        dropped=tuple(dropped),
        unproduced=tuple(text for text in left if text in new),
        without_split=len(split),
        lost=tuple(text for text in left if text not in new),
    )
    return _with_controls(model, controls, pad), account


def _with_controls(model: Model, controls: Sequence[str], pad: str | None) -> Model:
    """Control pieces at the end: they travel inside tokenizer.model, and no text turns into them."""
    made = Model()
    made.CopyFrom(model)
    for text in [*controls, *([pad] if pad else [])]:
        if not text or any(text == p.piece for p in made.pieces):
            raise UnsupportedVocab(f"special token {text!r}: it is empty, or a piece already. Choose another text.")
        if text not in unproduced(appended(model, [text], "zero")):
            raise UnsupportedVocab(
                f"special token {text!r}: llama.cpp, which joins text to special tokens as well, would make it out of plain "
                "text. Choose a text of more parts, as [PAD] or <|im_start|>."
            )
        made.pieces.add(piece=text, score=0.0, type=Kind.CONTROL)
    if pad:
        made.trainer_spec.pad_id = len(made.pieces) - 1
        made.trainer_spec.pad_piece = pad
    return made

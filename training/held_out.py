"""Which documents and conversations are not trained on."""

import hashlib
from collections.abc import Callable, Iterable


def position(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on a text and the seed alone; those below a threshold are held out.

    So equal texts never stand on both sides, and neither their order nor other texts move one.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def threshold(positions: Callable[[], Iterable[float]], share: float) -> float:
    """The share, or as much more as holds out one text where the share would hold out none."""
    if not share or any(at < share for at in positions()):
        return share
    lowest = min(positions(), default=0.0)
    return min((at for at in positions() if at > lowest), default=1.0)

"""Whether a text was seen before in nearly the same words."""

import math
import unicodedata
from array import array


class Seen:
    """The texts so far, and the search among them for one that is like another.

    Likeness is ROUGE-2 F1 over characters (Lin 2004), of sets: twice the common bigrams by the bigrams of both. Self-instruct
    (Wang et al. 2022) drops what is over 0.7 by ROUGE-L, which has to compare every pair.

    The search is exact. Two sets x, y with 2|x∩y| >= t(|x|+|y|) share a bigram among the first |x| - ceil(t/(2-t)·|x|) + 1 of
    each, in any one order of all bigrams: "prefix filtering" (Chaudhuri et al. 2006; Bayardo et al. 2007). The order here is
    that of first sight, backwards: what is met late is rare, and leads to few texts.
    """

    def __init__(self, threshold: float = 0.7):
        self._threshold = threshold
        self._numbers: dict[str, int] = {}  # of bigrams
        self._sets: list[array] = []
        self._holders: dict[int, list[int]] = {}  # bigram -> texts that have it among their first

    def add(self, text: str) -> bool:
        """Remember a text; False, and nothing is remembered, when one like it is there. A text without letters is like none."""
        numbers = {self._numbers.setdefault(gram, len(self._numbers)) for gram in _bigrams(text)}
        first = sorted(numbers, reverse=True)[: self._n_first(len(numbers))]
        if self._any_like(numbers, first):
            return False
        for number in first:
            self._holders.setdefault(number, []).append(len(self._sets))
        self._sets.append(array("I", numbers))
        return True

    def _any_like(self, numbers: set[int], first: list[int]) -> bool:
        candidates = {i for number in first for i in self._holders.get(number, ())}
        for i in candidates:
            other = self._sets[i]
            need = self._threshold * (len(numbers) + len(other)) / 2
            if min(len(numbers), len(other)) >= need and len(numbers.intersection(other)) >= need:
                return True
        return False

    def _n_first(self, n: int) -> int:
        return n - math.ceil(self._threshold / (2 - self._threshold) * n) + 1 if n else 0


def _bigrams(text: str) -> set[str]:
    """Pairs of neighbouring letters and digits, whatever their width and case; punctuation and spaces are passed over."""
    kept = "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())
    return {kept[i : i + 2] for i in range(len(kept) - 1)} or ({kept} if kept else set())

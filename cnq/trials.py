"""The child of bench.py: runs a model in several ways, in turns, and times them, or compares what they answer."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import peoples_daily
from .engine.child import Tell, serve
from .engine.model import Model
from .gguf_file import GgufFile
from .scores import Scores, against, log_sum_exp
from .tuning import Tuned

N_CTX = 560  # tokens: room for the longest trial
_SEED = 0  # the same tokens every time
_CHARACTERS = 16  # of text for each token that is wanted, more than any token has on average


class _Trials:
    """Weights stay loaded from one request to the next, as long as it wants them."""

    def __init__(self) -> None:
        self._weights: dict[tuple[bool, bool], Model] = {}

    def time(self, tell: Tell, gguf: str, ways: list[dict[str, Any]], n_prompt: int, n_gen: int, rounds: int) -> Any:
        """[way][round] = (seconds a token of a prompt of n_prompt tokens, of the n_gen tokens after it); 0.0 where n is 0.

        The ways run in turns, each round beginning with another one; a short run of each before that does not count.
        Tells of every run.
        """
        with ExitStack() as stack:
            models = self._contexts(stack, gguf, ways)
            ids = np.random.default_rng(_SEED).integers(0, models[0].n_vocab, n_prompt + n_gen).tolist()
            seconds: list[list[tuple[float, float]]] = [[] for _ in ways]
            for model in models:
                _run(model, ids, min(n_prompt, 16), min(n_gen, 2))
            for turn in range(rounds):
                for i in range(len(ways)):
                    way = (turn + i) % len(ways)
                    seconds[way].append(_run(models[way], ids, n_prompt, n_gen))
                    tell(way)
        return seconds

    def compare(self, tell: Tell, gguf: str, ways: list[dict[str, Any]], n: int) -> Any:
        """What the other ways answer beside the first one, on n tokens of Chinese text: for each (KLD, its error, same top).

        The first quarter of the tokens is context only. Same top in percent.
        """
        text = "\n".join(peoples_daily("held-out").documents)[: _CHARACTERS * n]
        with ExitStack() as stack:
            models = self._contexts(stack, gguf, ways)
            ids = models[0].tokenize(text, add_special=True, parse_special=False)[:n]
            first, targets = n // 4, np.array(ids[n // 4 + 1 :])
            scores = [Scores(1, len(targets)) for _ in ways]
            base = None
            for model, score in zip(models, scores, strict=True):
                logits = model.logits(ids, first)[:-1]
                score.put(0, slice(None), logits, targets, base)
                if base is None:
                    base = logits - log_sum_exp(logits)[:, None].astype(np.float32)
        found = [against(score, "", scores[0]) for score in scores[1:]]
        return [(a.kld.value, a.kld.error, a.same_top.value) for a in found]

    def _contexts(self, stack: ExitStack, gguf: str, ways: list[dict[str, Any]]) -> list[Model]:
        """A context for each way, which `stack` closes."""
        tuned = [Tuned(**way) for way in ways]
        for key in self._weights.keys() - {(t.repack, t.mlock) for t in tuned}:
            self._weights.pop(key).close()
        models = []
        for t in tuned:
            key = t.repack, t.mlock
            if key not in self._weights:
                path = Path(gguf)
                self._weights[key] = Model(path, n_ctx=min(N_CTX, GgufFile(path).n_ctx or N_CTX), tuned=t)
            models.append(stack.enter_context(self._weights[key].fork(t)))
        return models


def _run(model: Model, ids: list[int], n_prompt: int, n_gen: int) -> tuple[float, float]:
    model.logits(ids[:1])  # forgets
    started = time.perf_counter()
    if n_prompt:
        model.next_logits(ids[:n_prompt])
    between = time.perf_counter()
    for n in range(n_prompt, n_prompt + n_gen):
        model.next_logits(ids[: n + 1])
    ended = time.perf_counter()
    return (between - started) / n_prompt if n_prompt else 0.0, (ended - between) / n_gen if n_gen else 0.0


if __name__ == "__main__":
    trials = _Trials()
    serve({"time": trials.time, "compare": trials.compare})

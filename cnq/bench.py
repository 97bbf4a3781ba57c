"""How a model runs fastest on this machine: a short search, one setting after the other, each kept only when it surely helps.

The model runs in a child process, with the ways that a setting may be in turns, so that what else the machine does meets all of
them. Another way is better when it was faster in every round, and by 3 % at the median.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from . import __version__
from .engine.child import Child
from .errors import CnqError, EngineError
from .files import decimal
from .gguf_file import TYPE_BY_NAME, GgufFile
from .machine import free_memory, logical_cores, physical_cores, this_machine
from .trials import N_CTX
from .tuning import Tuned, remember

GAIN = 1.03  # at least so much faster, at the median
TURN = (512, 128)  # tokens read and written: llama-bench's two tests, as one turn of a conversation
_SIZES = ((512, 32), (256, 16), (128, 8), (64, 4))  # tokens of a trial's prompt and answer, the longest first
_BUDGET, _QUICK = (5, 45.0), (3, 15.0)  # rounds, seconds
_COMPARED = 128  # tokens at least, to see what changes in the answers
_CHAT_CTX = 4096  # tokens, of a chat that names no --ctx

Seconds = tuple[float, float]  # for a token of a prompt, for a token of an answer


@dataclass(frozen=True)
class Option:
    """A way a setting may be. rate: tokens a second, median. ratio: how many times as fast as the present way was, round
    by round: median, least, most; None = it is the present way."""

    value: str
    rate: float
    ratio: tuple[float, float, float] | None
    kept: bool


@dataclass(frozen=True)
class Knob:
    """A setting that was tried. measure: prompt, answer or turn, what rate and ratio are of. options: the present way first."""

    name: str
    measure: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Drift:
    """How far a way is from attention in float32. kld: nats, error: of its mean; same_top: percent of the tokens with the
    same likeliest successor.

    With quantized weights every way is: inputs of a product are rounded to 8 bits, and the smallest difference turns some of
    these roundings over. F16 without flash attention, which is first, shows how much of that there is.
    """

    flash_attn: bool
    type_kv: str
    kld: float
    error: float
    same_top: float


@dataclass(frozen=True)
class Bench:
    """before, after: tokens a second of a prompt and of an answer, as llama.cpp runs it by itself and as tuned.

    n_prompt, n_gen: tokens of a trial. n_compared: tokens that drifts were measured on. record: where it is
    remembered, None when that failed.
    """

    path: Path
    tuned: Tuned
    before: tuple[float, float]
    after: tuple[float, float]
    knobs: tuple[Knob, ...]
    drifts: tuple[Drift, ...]
    n_prompt: int
    n_gen: int
    rounds: int
    n_compared: int
    record: Path | None
    estimate: float
    seconds: float
    notes: tuple[str, ...]


def bench(
    gguf: Path,
    *,
    quick: bool = False,
    type_kv: str | None = None,
    say: Callable[[str], object] = lambda text: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Bench:
    """Choose how `gguf` runs here, and remember it for tuning.best.

    quick: fewer and shorter trials. type_kv: what keys and values are kept in, F16 or Q8_0; None = Q8_0 only where the
    machine's memory is too small for F16. say: hears how long it will take, before it begins.
    Raises GgufError, EngineError with llama.cpp's words or the signal that killed it.
    """
    file = GgufFile(gguf)
    rounds, budget = _QUICK if quick else _BUDGET
    with Child("cnq.trials", lambda reason: EngineError(f"{gguf} was not measured: {reason}")) as child:
        return _Search(file, child, rounds, progress).run(type_kv, budget, say)


@dataclass(frozen=True)
class _Trial:
    """A setting to try. values: the present one first."""

    name: str
    measure: str
    values: tuple[Any, ...]


class _Search:
    """What is known on the way: how long trials are, and how much is done."""

    def __init__(self, file: GgufFile, child: Child, rounds: int, progress: Callable[[int, int], object]):
        self.file, self.child, self.rounds, self.progress = file, child, rounds, progress
        self.room = min(N_CTX, file.n_ctx or N_CTX) - 1  # tokens of a trial at most
        self.size = file.path.stat().st_size
        self.divides = not any(size % 32 for size in file.head_sizes)  # into Q8_0's blocks
        self.notes: list[str] = []
        self.done = self.total = 0

    def run(self, wanted_kv: str | None, budget: float, say: Callable[[str], object]) -> Bench:
        started = time.perf_counter()
        if (load := psutil.getloadavg()[0]) > logical_cores() / 2:
            self.notes.append(f"other programs keep this machine busy (load {load:.1f}): bench again later")
        type_kv = self._kv(wanted_kv)
        plain = Tuned(threads=physical_cores(), threads_batch=physical_cores())
        trials = tuple(self._trials(plain, type_kv))
        estimate = self._fit(plain, trials, budget)
        say(f"about {estimate:.0f} s: {self.rounds} rounds of {self.n_prompt} tokens read and {self.n_gen} written")
        present, tried = replace(plain, type_kv=type_kv), []
        trials = tuple(t for t in map(self._narrowed, trials) if len(t.values) > 1)
        self.total = self.rounds * (sum(len(t.values) for t in trials) + 2)
        for trial in trials:
            ways = [replace(present, **{trial.name: value}) for value in trial.values]
            times = self._time(ways, trial.measure)
            # keys and values are not chosen by speed: the trial shows what the other way would bring
            kept = 0 if trial.name == "type_kv" else _best(times, trial.measure)
            tried.append((trial, times, kept))
            present = ways[kept]
        before, after = self._time([plain, present], "turn")
        if type_kv == plain.type_kv and median(_ratios(before, after, "turn")) < 1:
            self.notes.append("all together it was no faster than llama.cpp's own choice, which is kept")
            present, after = plain, before
            tried = [(trial, times, 0) for trial, times, _ in tried]
        drifts, n_compared = self._drifts(plain)
        found = Bench(
            self.file.path, present, _rates(before), _rates(after), tuple(_knob(*t) for t in tried), drifts, self.n_prompt,
            self.n_gen, self.rounds, n_compared, None, estimate, time.perf_counter() - started, tuple(self.notes),
        )  # fmt: skip
        facts = {key: value for key, value in asdict(found).items() if key not in ("path", "tuned", "record")}
        try:
            return replace(found, record=remember(self.file.path, present, {"cnq": __version__, "found": facts}))
        except CnqError as error:
            return replace(found, notes=(*found.notes, f"not remembered: {error}"))

    def _kv(self, wanted: str | None) -> str:
        """What keys and values are to be kept in."""
        if wanted == "Q8_0" and not self.divides:
            raise EngineError(f"{self.file.path}: heads of {self.file.head_sizes[0]} do not divide into Q8_0's blocks of 32.")
        if wanted:
            return wanted
        n_ctx = min(self.file.n_ctx or _CHAT_CTX, _CHAT_CTX)
        numbers, memory = n_ctx * self.file.kv_width, this_machine().memory
        need, smaller = (self.size + numbers * TYPE_BY_NAME[type].bits / 8 for type in ("F16", "Q8_0"))
        if need <= memory or smaller > memory or not self.divides:
            return "F16"
        self.notes.append(
            f"keys and values are kept as Q8_0, which changes answers a little: as F16 the model with {n_ctx} tokens of "
            f"context takes {decimal(int(need))}, and the memory is {decimal(memory)}"
        )
        return "Q8_0"

    def _trials(self, plain: Tuned, type_kv: str) -> Iterator[_Trial]:
        """What is tried, in this order."""
        cores = plain.threads
        counts = (cores, *sorted({max(1, cores // 2), max(1, 3 * cores // 4), logical_cores()} - {cores}))
        yield _Trial("threads", "answer", counts)
        yield _Trial("threads_batch", "prompt", counts)
        twice = 2.2 * self.size < free_memory()
        if twice:
            yield _Trial("repack", "turn", (True, False))
        if type_kv == "F16":  # Q8_0 needs it
            yield _Trial("flash_attn", "turn", (True, False))
        yield _Trial("batch", "prompt", (plain.batch, 128, 256))
        if twice and _may_lock(self.size):
            yield _Trial("mlock", "answer", (False, True))
        if self.divides:
            yield _Trial("type_kv", "turn", (type_kv, "Q8_0" if type_kv == "F16" else "F16"))
        if not twice:
            self.notes.append("repack and mlock were not tried: the model does not fit into the free memory twice")
        elif not _may_lock(self.size):
            self.notes.append("mlock was not tried: the system does not let so much be locked (ulimit -l)")

    def _narrowed(self, trial: _Trial) -> _Trial:
        """Without batches that are alike, because the trial's prompt fits into one."""
        if trial.name != "batch":
            return trial
        return replace(trial, values=tuple(v for i, v in enumerate(trial.values) if i == 0 or v < self.n_prompt))

    def _fit(self, plain: Tuned, trials: Sequence[_Trial], budget: float) -> float:
        """Choose the length of the trials by a short one; how many seconds all will take."""
        probe = min(64, self.room // 2), min(4, self.room // 4)
        started = time.perf_counter()
        self._ask([plain], *probe, 1)
        loading = time.perf_counter() - started
        (found,) = self._ask([plain], *probe, 3)
        prompt, answer = (min(seconds) for seconds in zip(*found, strict=True))
        reads, writes = (
            2 + sum(len(t.values) for t in trials if t.measure in (measure, "turn")) for measure in ("prompt", "answer")
        )
        for self.n_prompt, self.n_gen in [s for s in _SIZES if sum(s) <= self.room] or [probe]:
            compare = 4 * max(_COMPARED, self.n_prompt) * prompt
            trying = self.rounds * (reads * self.n_prompt * prompt + writes * self.n_gen * answer)
            if (seconds := trying + compare + 3 * loading) <= budget:
                break
        return seconds

    def _time(self, ways: list[Tuned], measure: str) -> list[list[Seconds]]:
        def tick(way: int) -> None:
            self.done += 1
            self.progress(self.done, self.total)

        n_prompt = self.n_prompt if measure != "answer" else 0
        n_gen = self.n_gen if measure != "prompt" else 0
        return self._ask(ways, n_prompt, n_gen, self.rounds, tick)

    def _ask(
        self, ways: list[Tuned], n_prompt: int, n_gen: int, rounds: int, hear: Callable[[int], object] = lambda way: None
    ) -> list[list[Seconds]]:
        request = {"gguf": str(self.file.path), "ways": [asdict(way) for way in ways]}
        answer = self.child.ask("time", request | {"n_prompt": n_prompt, "n_gen": n_gen, "rounds": rounds}, hear)
        return [[(read, written) for read, written in way] for way in answer]

    def _drifts(self, plain: Tuned) -> tuple[tuple[Drift, ...], int]:
        """What flash attention changes, and Q8_0 with it; on how many tokens that was seen."""
        n = min(max(_COMPARED, self.n_prompt), self.room)
        ways = [replace(plain, flash_attn=False, type_kv="F32"), replace(plain, flash_attn=False), plain]
        if self.divides:
            ways.append(replace(plain, type_kv="Q8_0"))
        found = self.child.ask("compare", {"gguf": str(self.file.path), "ways": [asdict(way) for way in ways], "n": n})
        return tuple(Drift(way.flash_attn, way.type_kv, *f) for way, f in zip(ways[1:], found, strict=True)), n


def _cost(seconds: Seconds, measure: str) -> float:
    """Seconds, of what a setting is measured by."""
    n_prompt, n_gen = {"prompt": (1, 0), "answer": (0, 1), "turn": TURN}[measure]
    return n_prompt * seconds[0] + n_gen * seconds[1]


def _ratios(present: list[Seconds], other: list[Seconds], measure: str) -> list[float]:
    """How many times as fast the other way was, round by round."""
    return [_cost(a, measure) / _cost(b, measure) for a, b in zip(present, other, strict=True)]


def _best(times: list[list[Seconds]], measure: str) -> int:
    """Which way is kept: the present one, which comes first, or the fastest of those that surely are faster."""
    ratios = [_ratios(times[0], other, measure) for other in times]
    better = [i for i, r in enumerate(ratios) if min(r) > 1 and median(r) >= GAIN]
    return max(better, key=lambda i: median(ratios[i]), default=0)


def _knob(trial: _Trial, times: list[list[Seconds]], kept: int) -> Knob:
    tokens = sum(TURN) if trial.measure == "turn" else 1
    options = []
    for i, (value, rounds) in enumerate(zip(trial.values, times, strict=True)):
        ratios = _ratios(times[0], rounds, trial.measure)
        spread = (median(ratios), min(ratios), max(ratios)) if i else None
        rate = tokens / median(_cost(seconds, trial.measure) for seconds in rounds)
        shown = ("on" if value else "off") if isinstance(value, bool) else str(value)
        options.append(Option(shown, rate, spread, i == kept))
    return Knob(trial.name, trial.measure, tuple(options))


def _rates(rounds: list[Seconds]) -> tuple[float, float]:
    return 1 / median(prompt for prompt, _ in rounds), 1 / median(answer for _, answer in rounds)


def _may_lock(size: int) -> bool:
    """Whether this process may keep so many bytes in memory."""
    with suppress(ImportError):  # Windows: llama.cpp asks for more by itself
        import resource

        soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        return soft == resource.RLIM_INFINITY or soft >= size
    return True

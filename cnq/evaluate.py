"""What a quantization lost: perplexity, bits per byte, and the divergence from the float model, token by token.

Definitions are llama-perplexity's (llama.cpp tools/perplexity/perplexity.cpp): chunks of n_ctx tokens beginning with bos, the
second half scored. Both models run side by side, so that no file of logits is needed and nothing is rounded to 16 bits.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from .corpus import Chunks, Used
from .engine.model import Model
from .errors import EngineError, NoSpace, listed
from .files import decimal, replacing
from .gguf_file import GgufFile
from .imatrix import with_bos
from .logits_file import LogitsFile, LogitsWriter, file_bytes, n_scored

PERCENTILES = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
_CUT_OFF = -16.0  # nats: llama-perplexity leaves out what the base thinks less likely
_ROWS = 16  # scored at once: a block of logits that stays in the cache


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Against:
    """A model compared with its base, over the same tokens. KLD in nats; percentiles by percent.

    ratio: PPL / PPL of the base, its error with the covariance of both. dp: change of the true token's probability, in
    percent. same_top: share of tokens whose likeliest successor is the same, in percent.
    """

    base: str
    ppl_base: Estimate
    ratio: Estimate
    correlation: float
    kld: Estimate
    kld_max: float
    kld_percentiles: dict[float, float]
    dp: Estimate
    dp_rms: Estimate
    dp_percentiles: dict[float, float]
    same_top: Estimate


@dataclass(frozen=True)
class Measured:
    """One model on the text. ppl: with its error. bits_per_byte: comparable between vocabularies, as PPL is not.

    klds: of every scored token, for paired comparisons; None without a base.
    """

    path: Path
    nbytes: int
    bits_per_weight: float
    ppl: Estimate
    bits_per_byte: float
    against: Against | None
    klds: np.ndarray | None


@dataclass(frozen=True)
class Evaluation:
    base: Measured | None
    models: tuple[Measured, ...]
    n_ctx: int
    n_chunks: int
    n_scored: int
    manifest: tuple[Used, ...]
    seconds: float


def evaluate(
    ggufs: Sequence[Path],
    text: Callable[[Model], Chunks] | None,
    *,
    base: Path | None = None,
    logits: Path | None = None,
    n_ctx: int = 512,
    threads: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """Measure models on a text, and against a base.

    text: makes the chunks with a model's tokenizer; None takes those of the file `logits`. base: the float GGUF, run once for
    all models. logits: a file of base log-probabilities: read when it exists (base is then not run), else written, from the
    base, or from the first model when there is none. Where memory does not hold all models side by side, they run one after
    the other, the base through such a file.
    Raises GgufError, CorpusError, EngineError (other vocabularies), NoSpace.
    """
    started = time.perf_counter()
    stored = LogitsFile(logits) if logits and logits.exists() else None
    if base and not stored and _memory([base, *ggufs]) > _free_memory():
        return _one_by_one(ggufs, text, base, logits, n_ctx, threads, progress)
    n_ctx = stored.n_ctx if stored else n_ctx
    _require_memory([base, *ggufs] if base and not stored else ggufs)
    with ExitStack() as stack:
        models = [stack.enter_context(Model(path, n_ctx=n_ctx, n_batch=n_ctx, n_threads=threads)) for path in ggufs]
        base_model = None
        if base and not stored:
            base_model = stack.enter_context(Model(base, n_ctx=n_ctx, n_batch=n_ctx, n_threads=threads))
        reference = base_model or models[0]
        _require_one_vocabulary(ggufs, models, reference, stored)
        chunks = Chunks(stored.tokens, ()) if stored else text(reference)  # type: ignore[misc]
        scores = [_Scores() for _ in models]
        base_scores = _Scores()
        pool = stack.enter_context(ThreadPoolExecutor(threads or os.cpu_count()))
        writer = stack.enter_context(_writing(logits, chunks, reference.n_vocab)) if logits and not stored else None
        probs = stored.log_probs() if stored else None
        for i, tokens in enumerate(chunks.tokens):
            ids, first = with_bos(reference, tokens), n_ctx // 2
            targets = tokens[first + 1 :]
            against: _Block | None = None
            if probs:
                against = _known(next(probs), targets, base_scores)
            runs = list(zip(models, scores, strict=True))
            for model, found in [(base_model, base_scores), *runs] if base_model else runs:
                rows = model.logits(ids, first)[:-1]
                if writer and model is reference:
                    writer.add(rows)
                block = _score(pool, rows, targets, against, found)
                against = block if model is base_model else against
            progress(i + 1, len(chunks.tokens))
        n_bytes = sum(len(reference.piece(int(t))) for t in chunks.tokens[:, n_ctx // 2 + 1 :].ravel())
    name = base.name if base else logits.name if stored and logits else None
    return Evaluation(
        base=_measured(base, base_scores, None, None, n_bytes) if base_model and base else None,
        models=tuple(_measured(p, s, name, base_scores if name else None, n_bytes) for p, s in zip(ggufs, scores, strict=True)),
        n_ctx=n_ctx,
        n_chunks=len(chunks.tokens),
        n_scored=n_scored(n_ctx) * len(chunks.tokens),
        manifest=chunks.manifest,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Block:
    """What is kept of the base for one chunk. log_p: (n, n_vocab); p: its exponential, 0 below the cut-off."""

    log_p: np.ndarray
    p: np.ndarray
    target_log_p: np.ndarray
    top: np.ndarray


class _Scores:
    """Of every scored token: nll, and against the base kld, Δp and whether the likeliest successor is the same."""

    def __init__(self) -> None:
        self.nll: list[np.ndarray] = []
        self.kld: list[np.ndarray] = []
        self.dp: list[np.ndarray] = []
        self.same: list[np.ndarray] = []


def _score(pool: ThreadPoolExecutor, logits: np.ndarray, targets: np.ndarray, base: _Block | None, scores: _Scores) -> _Block:
    """Score one chunk: logits (n, n_vocab) of the positions before `targets`. Returns what later models are compared with.

    A few rows at a time on every core: at 128k tokens of vocabulary this is most of the work outside of llama.cpp.
    """
    n = len(targets)
    keep = base is None
    log_p = np.empty_like(logits) if keep else np.empty((0, 0), np.float32)
    p = np.empty_like(log_p)
    target_log_p, kld = np.empty(n), np.empty(n)
    top = np.empty(n, np.int64)

    def part(start: int) -> None:
        rows = slice(start, start + _ROWS)
        block = logits[rows]
        top[rows] = block.argmax(1)
        highest = block.max(1, keepdims=True)
        exp = np.exp(block - highest)
        total = exp.sum(1, dtype=np.float64)
        shift = highest[:, 0] + np.log(total)  # log Σ exp
        target_log_p[rows] = block[np.arange(len(block)), targets[rows]] - shift
        if keep:
            np.subtract(block, shift[:, None].astype(np.float32), out=log_p[rows])
            np.divide(exp, total[:, None].astype(np.float32), out=p[rows])
            p[rows][log_p[rows] <= _CUT_OFF] = 0
        elif base:
            # Σ p (log p − log q), log q = logit − log Σ exp: the small differences are summed, not their large parts
            apart = base.log_p[rows] - block
            apart += shift[:, None].astype(np.float32)
            kld[rows] = np.einsum("ij,ij->i", base.p[rows], apart)

    list(pool.map(part, range(0, n, _ROWS)))
    scores.nll.append(-target_log_p)
    if base:
        scores.kld.append(kld)
        scores.dp.append(np.exp(target_log_p) - np.exp(base.target_log_p))
        scores.same.append(top == base.top)
    return _Block(log_p, p, target_log_p, top)


def _known(log_p: np.ndarray, targets: np.ndarray, scores: _Scores) -> _Block:
    """The same from a file of base log-probabilities."""
    p = np.where(log_p > _CUT_OFF, np.exp(log_p), np.float32(0))
    target = log_p[np.arange(len(targets)), targets].astype(np.float64)
    scores.nll.append(-target)
    return _Block(log_p, p, target, log_p.argmax(1))


def _measured(path: Path, scores: _Scores, base_name: str | None, base: _Scores | None, n_bytes: int) -> Measured:
    file = GgufFile(path)
    nll = np.concatenate(scores.nll)
    log_ppl = _mean(nll)
    ppl = Estimate(float(np.exp(log_ppl.value)), float(np.exp(log_ppl.value)) * log_ppl.error)
    klds = np.concatenate(scores.kld) if base else None
    return Measured(
        path=path,
        nbytes=path.stat().st_size,
        bits_per_weight=file.bits_per_weight,
        ppl=ppl,
        bits_per_byte=float(nll.sum() / np.log(2) / n_bytes),
        against=_against(scores, base_name, base, nll) if base and base_name else None,
        klds=klds,
    )


def _against(scores: _Scores, name: str, base: _Scores, nll: np.ndarray) -> Against:
    nll_base = np.concatenate(base.nll)
    log_ppl, log_base = _mean(nll), _mean(nll_base)
    covariance = float((nll * nll_base).mean() - nll.mean() * nll_base.mean()) / (len(nll) - 1)
    ratio = float(np.exp(log_ppl.value - log_base.value))
    variance = log_ppl.error**2 + log_base.error**2 - 2 * covariance
    both = log_ppl.error * log_base.error
    kld, dp = np.concatenate(scores.kld), 100 * np.concatenate(scores.dp)
    same = float(np.concatenate(scores.same).mean())
    squares = _mean(dp**2)
    rms = float(np.sqrt(squares.value))
    return Against(
        base=name,
        ppl_base=Estimate(float(np.exp(log_base.value)), float(np.exp(log_base.value)) * log_base.error),
        ratio=Estimate(ratio, ratio * float(np.sqrt(max(0.0, variance)))),
        correlation=covariance / both if both else 1.0,
        kld=_mean(kld),
        kld_max=float(kld.max()),
        kld_percentiles=_percentiles(kld),
        dp=_mean(dp),
        dp_rms=Estimate(rms, 0.5 / rms * squares.error if rms else 0.0),
        dp_percentiles=_percentiles(dp),
        same_top=Estimate(100 * same, 100 * float(np.sqrt(same * (1 - same) / (len(nll) - 1)))),
    )


def _mean(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), float(np.sqrt(values.var() / (len(values) - 1))))


def _percentiles(values: np.ndarray) -> dict[float, float]:
    return {p: float(np.percentile(values, p)) for p in PERCENTILES}


@contextmanager
def _writing(path: Path, chunks: Chunks, n_vocab: int) -> Iterator[LogitsWriter]:
    """A writer of base log-probabilities, whose file appears when it is complete."""
    need = file_bytes(len(chunks.tokens), chunks.tokens.shape[1], n_vocab)
    with replacing(path, need=need) as partial, LogitsWriter(partial, chunks.tokens, n_vocab) as writer:
        yield writer


def _one_by_one(
    ggufs: Sequence[Path],
    text: Callable[[Model], Chunks] | None,
    base: Path,
    logits: Path | None,
    n_ctx: int,
    threads: int,
    progress: Callable[[int, int], object],
) -> Evaluation:
    """The same with one model in memory at a time: the base's log-probabilities pass through a file of 16-bit codes."""
    started = time.perf_counter()
    runs = 1 + len(ggufs)
    with tempfile.TemporaryDirectory(prefix=".cnq-", dir=ggufs[0].parent) as scratch:
        path = logits or Path(scratch) / "base.kld"

        def run(number: int, gguf: Path, first: bool) -> Evaluation:
            def tick(done: int, total: int) -> object:
                return progress(number * total + done, runs * total)

            return evaluate([gguf], text if first else None, logits=path, n_ctx=n_ctx, threads=threads, progress=tick)

        whole = run(0, base, True)
        found = [run(i, gguf, False).models[0] for i, gguf in enumerate(ggufs, 1)]
    named = [replace(m, against=replace(m.against, base=base.name)) for m in found if m.against]
    return replace(whole, base=whole.models[0], models=tuple(named), seconds=time.perf_counter() - started)


def _memory(paths: Sequence[Path]) -> int:
    """About what models take side by side: their files, and room for contexts and logits. Bytes."""
    return int(sum(p.stat().st_size for p in paths if p.exists()) * 1.05) + 500_000_000


def _free_memory() -> int:
    return int(psutil.virtual_memory().available)


def _require_memory(paths: Sequence[Path]) -> None:
    need, free = _memory(paths), _free_memory()
    if free < need:
        raise NoSpace(
            f"{decimal(need)} of memory needed for {listed(p.name for p in paths)}, {decimal(free)} free. "
            "Close other programs, or measure on a machine with more."
        )


def _require_one_vocabulary(paths: Sequence[Path], models: Sequence[Model], first: Model, stored: LogitsFile | None) -> None:
    for path, model in zip(paths, models, strict=True):
        if model.fields.get("tokenizer.ggml.tokens") != first.fields.get("tokenizer.ggml.tokens"):
            raise EngineError(
                f"{path} has another vocabulary than its base ({model.n_vocab} and {first.n_vocab} tokens): "
                "their probabilities cannot be compared. Give files made from one model."
            )
    if stored and stored.n_vocab != first.n_vocab:
        raise EngineError(
            f"{stored.path} is of a model with {stored.n_vocab} tokens, {paths[0]} has {first.n_vocab}. "
            "Give the base logits of the same model."
        )

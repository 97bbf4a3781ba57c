"""What a quantization lost: perplexity, bits per byte, and the divergence from the float model, token by token.

Definitions are llama-perplexity's (llama.cpp tools/perplexity/perplexity.cpp): chunks of n_ctx tokens beginning with bos, the
second half scored. Both models run side by side, so that no file of logits is needed and nothing is rounded to 16 bits.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from .corpus import Chunks, Used
from .engine.model import Model
from .errors import EngineError, listed
from .files import replacing, require_memory
from .gguf_file import GgufFile
from .imatrix import with_bos
from .logits_file import LogitsFile, LogitsWriter, file_bytes, n_scored
from .machine import free_memory, physical_cores
from .scores import Against, Estimate, Scores, against, log_sum_exp

_BLOCK = 1 << 18  # logits scored at once: 1 MB of float32, which stays in a core's cache


@dataclass(frozen=True)
class Measured:
    """One model on the text. ppl: with its error. bits_per_byte: comparable between vocabularies, as PPL is not.

    klds, same: of every scored token, for paired comparisons: its KLD, and whether the likeliest successor is the base's;
    None without a base.
    """

    path: Path
    nbytes: int
    bits_per_weight: float
    ppl: Estimate
    bits_per_byte: float
    against: Against | None
    klds: np.ndarray | None
    same: np.ndarray | None = None


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
    if base and not stored and _memory([base, *ggufs]) > free_memory():
        return _one_by_one(ggufs, text, base, logits, n_ctx, threads, progress)
    n_ctx = stored.n_ctx if stored else n_ctx
    paths = [base, *ggufs] if base and not stored else list(ggufs)
    require_memory(_memory(paths), f"measure {listed(p.name for p in paths)}")
    gone = threading.Event()
    with ExitStack() as stack:
        models = [
            stack.enter_context(Model(path, n_ctx=n_ctx, n_batch=n_ctx, n_threads=threads, stop=gone.is_set)) for path in paths
        ]
        first = models[0]  # the base, or the one whose logits are written
        _require_one_vocabulary(paths, models, stored)
        chunks = Chunks(stored.tokens, ()) if stored else text(first)  # type: ignore[misc]
        n_chunks, n = len(chunks.tokens), n_scored(n_ctx)
        scores = [Scores(n_chunks, n) for _ in paths]
        known = Scores(n_chunks, n) if stored else None
        writer = stack.enter_context(_writing(logits, chunks, first.n_vocab)) if logits and not stored else None
        step = max(1, _BLOCK // first.n_vocab)

        def measure(chunk: int, contexts: Sequence[Model]) -> None:
            tokens = chunks.tokens[chunk]
            ids = with_bos(first, tokens)
            found = [model.logits_in_place(ids, n_ctx // 2)[:-1] for model in contexts]
            for start in range(0, n, step):
                rows = slice(start, min(start + step, n))
                targets = tokens[n_ctx // 2 + 1 :][rows]
                base_log_probs = None
                if stored and known:
                    base_log_probs = stored.log_probs(chunk, rows)
                    known.put_known(chunk, rows, base_log_probs, targets)
                if writer:
                    writer.put(chunk, start, found[0][rows])
                for of_model, all_logits in zip(scores, found, strict=True):
                    part = all_logits[rows]
                    of_model.put(chunk, rows, part, targets, base_log_probs)
                    if base and of_model is scores[0] and not stored:
                        base_log_probs = part - log_sum_exp(part)[:, None].astype(np.float32)

        share_out(measure, models, n_chunks, threads or physical_cores(), gone, progress)
        n_bytes = sum(len(first.piece(int(t))) for t in chunks.tokens[:, n_ctx // 2 + 1 :].ravel())
    of_base = known or (scores[0] if base else None)
    name = base.name if base else logits.name if stored and logits else None
    return Evaluation(
        base=_measured(base, scores[0], None, None, n_bytes) if base and not stored else None,
        models=tuple(_measured(p, s, name, of_base, n_bytes) for p, s in zip(ggufs, scores[-len(ggufs) :], strict=True)),
        n_ctx=n_ctx,
        n_chunks=n_chunks,
        n_scored=n * n_chunks,
        manifest=chunks.manifest,
        seconds=time.perf_counter() - started,
    )


def share_out(
    measure: Callable[[int, Sequence[Model]], None],
    models: Sequence[Model],
    n_chunks: int,
    threads: int,
    gone: threading.Event,
    progress: Callable[[int, int], object],
) -> None:
    """Call `measure` for every chunk, with contexts of `models` of its own: several chunks at a time, one in each thread.

    Threads that work on one chunk wait for each other after every operation; those with chunks of their own never do. Where
    memory or chunks are too few for that, each chunk gets several threads. When one fails, `gone` stops the others.
    """
    room = free_memory() // sum(model.context_bytes for model in models)
    workers = max(1, min(threads, n_chunks, 1 + room))
    with ExitStack() as stack:
        idle: SimpleQueue[Sequence[Model]] = SimpleQueue()
        for number in range(workers):
            contexts = [stack.enter_context(model.fork()) for model in models] if number else models
            for model in contexts:
                model.use_threads(threads // workers)
            idle.put(contexts)

        def work(chunk: int) -> None:
            contexts = idle.get()
            try:
                measure(chunk, contexts)
            finally:
                idle.put(contexts)

        with ThreadPoolExecutor(workers) as pool:
            try:
                for done, future in enumerate(as_completed([pool.submit(work, chunk) for chunk in range(n_chunks)]), 1):
                    future.result()
                    progress(done, n_chunks)
            except BaseException:
                gone.set()
                pool.shutdown(cancel_futures=True)
                raise


def _measured(path: Path, scores: Scores, base_name: str | None, base: Scores | None, n_bytes: int) -> Measured:
    return Measured(
        path=path,
        nbytes=path.stat().st_size,
        bits_per_weight=GgufFile(path).bits_per_weight,
        ppl=scores.perplexity(),
        bits_per_byte=float(scores.nll.sum() / np.log(2) / n_bytes),
        against=against(scores, base_name, base) if base and base_name else None,
        klds=scores.kld.ravel() if base else None,
        same=(scores.top == base.top).ravel() if base else None,
    )


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


def _require_one_vocabulary(paths: Sequence[Path], models: Sequence[Model], stored: LogitsFile | None) -> None:
    first = models[0]
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

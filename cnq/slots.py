"""A model shared by many askers: a few contexts on the same weights, each with a thread, and a bounded queue before them.

Native code never runs on the event loop. What is made waits in memory for its reader, who may be slow: a context is free as
soon as the last token is drawn. An asker who leaves frees it within milliseconds.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from .context import choose_context
from .engine.model import Model
from .errors import CnqError, NoSpace
from .gguf_file import GgufFile
from .machine import free_memory
from .tuning import best

CORES_OF_A_SLOT = 4  # with fewer, two answers at a time come no sooner than one after the other
MOST_SLOTS = 4  # by default
Put = Callable[[Any], None]
Work = Callable[[Model, Put], None]  # runs in the thread; its second argument passes something on


class Busy(CnqError):
    """seconds: until a place is likely free."""

    def __init__(self, seconds: int):
        self.seconds = seconds
        super().__init__(f"the queue is full. Try again in {seconds} s.")


class Stopping(CnqError):
    def __init__(self) -> None:
        super().__init__("the server is stopping.")


class Turn:
    """What comes of a work: iterate over it. Close it, early if nobody listens any more."""

    def __init__(self) -> None:
        self._made: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Raises what the work raised, and Stopping when the server ends before it was its turn."""
        while True:
            kind, value = await self._made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def close(self) -> None:
        if self._task:
            self._task.cancel()


class Slots:
    """The contexts and their queue, for one event loop. Await `stop` before the models are closed."""

    def __init__(self, models: Sequence[Model], queue: int):
        """models: one for each work that may run at the same time. queue: how many more may wait."""
        self.model = models[0]
        self.n_slots, self.n_queue = len(models), queue
        self._free = deque(models)  # the one that rested longest first
        self._turns = asyncio.Semaphore(len(models))
        self._threads = ThreadPoolExecutor(len(models), "slot")
        self._inside: dict[asyncio.Task[None], Turn] = {}
        self._running: dict[Turn, Model] = {}
        self._took: deque[float] = deque(maxlen=20)  # seconds
        self._stopping = False

    @property
    def n_running(self) -> int:
        """May be asked from any thread."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._inside) - len(self._running)

    def require_place(self) -> None:
        """Raise Busy when the queue is full, Stopping when the server is about to end."""
        if self._stopping:
            raise Stopping
        if len(self._inside) >= self.n_slots + self.n_queue:
            raise Busy(self._wait())

    def start(self, work: Work, prompt: Sequence[int] = ()) -> Turn:
        """Take a place in the queue. prompt: what the work will begin with, to choose the context that knows most of it.

        Raises as require_place does.
        """
        self.require_place()
        turn = Turn()
        task = turn._task = asyncio.get_running_loop().create_task(self._run(turn, work, prompt))
        self._inside[task] = turn
        task.add_done_callback(self._inside.pop)
        return turn

    async def _run(self, turn: Turn, work: Work, prompt: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()

        def put(value: Any) -> None:
            loop.call_soon_threadsafe(turn._made.put_nowait, ("value", value))

        async with self._turns:
            # What is saved less what is lost; among equals the first, which rested longest.
            model = max(self._free, key=lambda m: 2 * m.holds(prompt) - m.n_seen)
            self._free.remove(model)
            self._running[turn] = model
            model.resume()
            started = time.perf_counter()
            try:
                await _outlast(loop.run_in_executor(self._threads, work, model, put), model)
                turn._made.put_nowait(("end", None))
            except Exception as error:
                turn._made.put_nowait(("error", error))
            finally:
                del self._running[turn]
                self._free.append(model)
                self._took.append(time.perf_counter() - started)

    def _wait(self) -> int:
        """Seconds until the first place in the queue is likely free."""
        mean = sum(self._took) / len(self._took) if self._took else 1
        return min(60, math.ceil(mean / self.n_slots))

    async def stop(self, seconds: float) -> None:
        """Send those who wait away, give those who run so long to end, then interrupt them."""
        self._stopping = True
        for task, turn in list(self._inside.items()):
            if turn not in self._running:
                turn._made.put_nowait(("error", Stopping()))
                task.cancel()
        if self._inside:
            await asyncio.wait(list(self._inside), timeout=seconds)
        for model in self._running.values():
            model.interrupt()
        if self._inside:
            await asyncio.wait(list(self._inside))
        self._threads.shutdown()


async def _outlast(working: "asyncio.Future[None]", model: Model) -> None:
    """Wait for the thread; when cancelled, interrupt it and wait all the same, as it uses the context until it ends."""
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            model.interrupt()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([working])
        if not working.cancelled():
            working.exception()  # it is nobody's any more
        raise


class Embedders:
    """A context of its own for the vectors of texts, made when the first is asked for."""

    def __init__(self, model: Model, queue: int):
        self._model, self._queue = model, queue
        self._making = asyncio.Lock()
        self._slots: Slots | None = None

    async def vector(self, tokens: list[int]) -> np.ndarray:
        """(hidden size,) float32 of length 1. Raises as Slots.start and Model.embedding do."""
        async with self._making:
            if not self._slots:
                need, free = self._model.context_bytes, free_memory()
                if need > free:
                    raise NoSpace(f"a context for embeddings takes {decimal(need)}, {decimal(free)} of memory are free.")
                self._slots = Slots([await asyncio.to_thread(self._model.embedder)], self._queue)
        turn = self._slots.start(lambda model, put: put(model.embedding(tokens)))
        try:
            (vector,) = [vector async for vector in turn]
            return vector
        finally:
            turn.close()

    async def stop(self) -> None:
        if self._slots:
            await self._slots.stop(0)
            self._slots.model.close()


@contextmanager
def open_slots(
    gguf: Path, *, parallel: int | None, queue: int, n_ctx: int | None = None, threads: int = 0
) -> Iterator[tuple[Slots, tuple[str, ...]]]:
    """Load a GGUF with a context for each of `parallel` answers: the slots, and what the user should know.

    parallel: None = one for every CORES_OF_A_SLOT threads, at most MOST_SLOTS, and what fits into memory. n_ctx: tokens of
    each, see choose_context. threads: of all together; 0 = what `cnq bench`
    chose, or physical cores.
    Raises GgufError, EngineError, NoSpace.
    """
    context = choose_context(GgufFile(gguf), n_ctx)
    with ExitStack() as stack:
        model = stack.enter_context(Model(gguf, n_ctx=context.n_ctx, n_threads=threads, tuned=best(gguf)))
        wanted = parallel or min(MOST_SLOTS, max(1, model.n_threads // CORES_OF_A_SLOT))
        free = free_memory()
        fitting = 1 + free // model.context_bytes
        if parallel and parallel > fitting:
            raise NoSpace(
                f"{parallel} contexts of {model.n_ctx} tokens take {decimal(model.context_bytes)} each, {decimal(free)} of "
                f"memory are free. Try --parallel {fitting}, or a smaller --ctx."
            )
        n = min(wanted, fitting)
        models = [model, *(stack.enter_context(model.fork()) for _ in range(n - 1))]
        fewer = () if n == wanted else (f"memory holds {n} contexts of {model.n_ctx} tokens, not {wanted}",)
        yield Slots(models, queue), (*context.notes, *fewer)

"""The pieces of an answer, made in another thread: the one that draws hears Ctrl-C at once, also within a long pass."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

_WAIT = 0.1  # seconds without a piece, after which there is an empty one


@contextmanager
def arriving(pieces: Iterator[str], stop: Callable[[], object]) -> Iterator[Iterator[str]]:
    """Iterate over `pieces` in a thread of its own; until the block ends Ctrl-C calls `stop`, which must make them end.

    Yields them as they come, with empty ones while nothing comes. What the thread raises is raised here.
    """
    queue: SimpleQueue[str | BaseException | None] = SimpleQueue()

    def work() -> None:
        try:
            for piece in pieces:
                queue.put(piece)
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    thread = threading.Thread(target=work)
    before = signal.signal(signal.SIGINT, lambda number, frame: stop())
    try:
        thread.start()
        yield _taken(queue)
    finally:
        if thread.is_alive():
            stop()
        thread.join()
        signal.signal(signal.SIGINT, before)


def _taken(queue: "SimpleQueue[str | BaseException | None]") -> Iterator[str]:
    while True:
        try:
            item = queue.get(timeout=_WAIT)
        except Empty:
            yield ""
            continue
        if item is None:
            return
        if isinstance(item, BaseException):
            raise item
        yield item

"""Native code in a process of its own: an abort becomes one error, and Ctrl-C leaves nothing running.

The parent (Child) writes a JSON request a line to the child's stdin; the child (serve) answers with JSON lines: any number of
{"event": …}, then {"done": result}, {"failure": text} or {"errno": number}. The end of its stdin tells the child that the
parent is gone, however it went.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from ..errors import CnqError

_early: dict[str, subprocess.Popen[str]] = {}


def _start(module: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        # An abort prints its reason, and does not call a debugger; matrix products of numpy leave the threads to us.
        env=os.environ | {"GGML_NO_BACKTRACE": "1", "OPENBLAS_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1"},
    )


@contextmanager
def started_early(module: str) -> Iterator[None]:
    """Start an interpreter with `module` now, for the next Child of it: it imports while the parent still does."""
    _early[module] = _start(module)
    try:
        yield
    finally:
        if module in _early:
            _end(_early.pop(module))


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        with suppress(BrokenPipeError):
            stream.close()  # type: ignore[union-attr]


class Child:
    """A process that runs a module's `serve`. Use it in a `with`; it starts at once, and the parent may go on meanwhile."""

    def __init__(self, module: str, failed: Callable[[str], CnqError]):
        """failed: makes the error that `ask` raises out of the reason."""
        self._module, self._failed = module, failed

    def __enter__(self) -> Self:
        self._process = _early.pop(self._module) if self._module in _early else _start(self._module)
        self._errors: list[str] = []
        self._reader = threading.Thread(target=lambda: self._errors.extend(self._process.stderr or ()), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """End the child, and wait for its end; once more changes nothing."""
        self._process.kill()
        self._reader.join()
        _end(self._process)

    def kill(self) -> None:
        """End the child without waiting for its end."""
        self._process.kill()

    def ask(self, step: str, arguments: dict[str, Any], hear: Callable[[Any], object] = lambda event: None) -> Any:
        """Have the child do a step: its result. hear: gets what it tells on the way.

        Raises what `failed` makes of the child's reason, or of the signal that killed it; OSError from a file it used.
        """
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):  # it is dead already: its exit code will tell
            self._process.stdin.write(json.dumps({"step": step, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if not line.endswith("\n"):
                break  # it died within a word
            answer = json.loads(line)
            if "event" in answer:
                hear(answer["event"])
            elif "done" in answer:
                return answer["done"]
            elif "errno" in answer:
                raise OSError(answer["errno"], os.strerror(answer["errno"]))
            else:
                raise self._failed(answer["failure"])
        self._process.wait()
        self._reader.join()
        code = self._process.returncode
        if code < 0:
            last = "".join(self._errors[-1:]).strip()
            raise self._failed(f"llama.cpp was ended by {signal.Signals(-code).name}. {last}".strip())
        raise self._failed(" ".join(" ".join(self._errors[-3:]).split()) or f"its process ended with {code}, unanswered.")


# The child's side

Tell = Callable[[Any], None]


def serve(steps: dict[str, Callable[..., Any]]) -> None:
    """Do what the parent asks until it is gone; then this process ends, in the middle of its work too.

    steps: by name, functions of (tell, **arguments); tell passes on an event. CnqError and OSError go to the parent.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")  # native code prints to stdout now and then
    os.dup2(2, 1)
    answering = threading.Lock()

    def answer(**content: Any) -> None:
        with answering:
            print(json.dumps(content), file=answers, flush=True)

    for request in _requests():
        try:
            answer(done=steps[request["step"]](lambda event: answer(event=event), **request["arguments"]))
        except CnqError as error:
            answer(failure=str(error))
        except OSError as error:
            answer(errno=error.errno)


def _requests() -> Iterator[dict[str, Any]]:
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())

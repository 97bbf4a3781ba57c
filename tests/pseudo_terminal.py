"""A program in a pseudo-terminal: what it writes is kept, keys are sent to it, its size changes."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")
# In a process of its own: to fork one that has threads, as the tests do, is asking for a deadlock.
_BEGIN = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


class PseudoTerminal:
    """Use it in a `with`; the program is killed at its end if it still runs."""

    def __init__(self, *argv: str | Path, columns: int = 80, rows: int = 24, **environment: str):
        self.fd, inner = pty.openpty()
        self.resize(columns, rows)
        self._child = subprocess.Popen(
            [sys.executable, "-c", _BEGIN, *map(str, argv)],
            stdin=inner, stdout=inner, stderr=inner, env=os.environ | {"TERM": "xterm-256color"} | environment,
        )  # fmt: skip
        os.close(inner)
        self.raw = b""
        self._seen = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                some = os.read(self.fd, 1 << 16)
            except OSError:  # EIO: the program has ended
                return
            if not some:
                return
            self.raw += some
            for _ in range(some.count(b"\x1b[6n")):  # where the cursor is: a terminal answers that
                os.write(self.fd, b"\x1b[1;1R")

    def __enter__(self) -> "PseudoTerminal":
        return self

    def __exit__(self, *error: object) -> None:
        self._child.kill()
        self._child.wait()
        self._reader.join(2)
        os.close(self.fd)

    @property
    def text(self) -> str:
        """All that was written until now, without escape sequences."""
        return ESCAPES.sub("", self.raw.decode("utf-8", "replace")).replace("\r", "")

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait(self, pattern: str, seconds: float = 30) -> str:
        """The text so far, once it has the pattern in it; later calls look behind what was found."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if match := re.compile(pattern).search(self.text, self._seen):
                self._seen = match.end()
                return self.text
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} did not appear in:\n{self.text[-3000:]}")

    def end(self, seconds: float = 30) -> int:
        """Wait for the program's end: its exit code."""
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs:\n{self.text[-3000:]}") from None

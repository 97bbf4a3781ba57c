"""A program in a pseudo-terminal: what it writes is kept, keys are sent to it, its size changes."""

import fcntl
import os
import pty
import re
import signal
import struct
import termios
import threading
import time
from pathlib import Path

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


class PseudoTerminal:
    """Use it in a `with`; the program is killed at its end if it still runs."""

    def __init__(self, *argv: str | Path, columns: int = 80, rows: int = 24, **environment: str):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execvpe(str(argv[0]), [str(a) for a in argv], os.environ | {"TERM": "xterm-256color"} | environment)
        self.resize(columns, rows)
        self.raw = b""
        self.status: int | None = None
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
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
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
            if match := re.compile(pattern).search(self.text, getattr(self, "_seen", 0)):
                self._seen = match.end()
                return self.text
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} did not appear in:\n{self.text[-3000:]}")

    def end(self, seconds: float = 30) -> int:
        """Wait for the program's end: its exit code, or the signal that ended it, negative."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                return self.status
            time.sleep(0.02)
        raise AssertionError(f"it still runs:\n{self.text[-3000:]}")

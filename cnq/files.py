"""Writing a large file or directory completely or not at all, and knowing a file again."""

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path

from filelock import FileLock, Timeout
from rich.filesize import decimal

from .errors import CnqError, NoSpace, OutputExists, listed
from .machine import free_memory

PARTIAL = ".partial"
_TRIES = 10  # to get a lock that nobody holds
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(dst: Path, *, force: bool = False, need: int = 0, folder: bool = False) -> Iterator[Path]:
    """Yield a path beside `dst` to write a file (or a `folder`) to; it takes dst's place when the block ends well.

    On any exception, Ctrl-C included, nothing is left behind. After a kill -9 the partial output stays and is replaced
    by the next run. `need` is the size in bytes that the disk must have room for.

    Raises OutputExists (dst is there and not `force`), NoSpace (before or while writing), CnqError (not writable, a
    directory where a file should go, or another cnq writes it).
    """
    try:
        if dst.name in ("", "..") or (dst.is_dir() and not folder):
            raise CnqError(f"{dst} is a folder. Name the {'folder' if folder else 'file'} to write in it.")
        if dst.exists() and not force:
            raise OutputExists(f"{dst} exists. Add --force to replace it, or name another output.")
        partial = dst.with_name(dst.name + PARTIAL)
        busy = f"{dst} is being written by another cnq. Wait for it, or name another output."
        with _made(dst.parent), locked(partial, busy):
            try:
                _remove(partial)
                require_space(dst.parent, need)
                yield partial
                _settle(partial)
                if dst.is_dir() and not dst.is_symlink():
                    shutil.rmtree(dst)  # rename cannot replace a directory that has files in it
                partial.replace(dst)
            finally:
                _remove(partial)
    except OSError as error:
        reason = f"{dst} cannot be written: {error.strerror or error}"
        if error.errno in _FULL:
            raise NoSpace(f"{reason}. Make room, or name an output on another disk (--out).") from error
        raise CnqError(f"{reason}. Name an output in a folder you may write to.") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a directory and those above it; after an exception they go away again."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for p in new:
            with suppress(OSError):  # not there, or with somebody else's files in it
                p.rmdir()
        raise


@contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Keep other cnqs from `file`, there or not. Raises OSError, and CnqError with the words `busy`."""
    path = file.with_name(file.name + ".lock")
    lock = FileLock(path, timeout=0)
    for _ in range(_TRIES):
        try:
            lock.acquire()
            break
        except Timeout:
            if path.exists():
                raise CnqError(busy) from None
            # Given up by its holder just now; or a folder without room for files (/proc), which filelock takes for a busy one.
    else:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file; there filelock does it
            path.unlink()  # while it is held: a moment later it may be another's
        lock.release()


def require_space(folder: Path, need: int) -> None:
    """Raise NoSpace unless the disk of `folder` (an existing directory) has `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise NoSpace(
            f"{folder}: {decimal(need)} needed, {decimal(free)} free. Make room, or name an output on another disk (--out)."
        )


def require_memory(need: int, task: str) -> None:
    """Raise NoSpace unless `need` bytes of memory are free."""
    free = free_memory()
    if free < need:
        raise NoSpace(f"{decimal(need)} of memory needed to {task}, {decimal(free)} free. Close other programs.")


def require_replaceable(dst: Path, src: Path, marker: str) -> None:
    """Raise OutputExists when --force would replace the folder `dst`, unless it is empty, or a model that does not hold `src`.

    marker: the file that a model's folder has.
    """
    holds_src = src.resolve().is_relative_to(dst.resolve())
    if dst.is_dir() and any(dst.iterdir()) and (holds_src or not (dst / marker).is_file()):
        raise OutputExists(f"{dst} is a folder with other things in it. Name another output.")


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def byte_size(text: str) -> int:
    """Bytes, from a number with a unit: 2GB = 2,000,000,000, 1.5 GiB = 1,610,612,736. Raises CnqError."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([A-Z]*)", text.strip().upper(), re.ASCII)
    size = int(Decimal(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if size < 1:
        raise CnqError(f"{text!r} is no size. Give bytes, or a number with {listed(list(_UNITS)[1:], 8)}: 2GB, 500 MB.")
    return size


def user_dir(kind: str) -> Path:
    """Where cnq keeps what is the user's: kind is state or cache. XDG's base directories; on Windows, LOCALAPPDATA. Not made.

    Raises CnqError for a user without a home.
    """
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else f"XDG_{kind.upper()}_HOME", "")
    if not Path(base).is_absolute():
        try:
            base = str(Path.home() / (".cache" if kind == "cache" else ".local/state"))
        except RuntimeError:
            raise CnqError(
                f"this user has no home directory. Set XDG_{kind.upper()}_HOME to a folder you may write to."
            ) from None
    return Path(base) / "cnq" / kind if sys.platform == "win32" else Path(base) / "cnq"


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _settle(path: Path) -> None:
    """Flush to the disk: a rename must not overtake the data it makes visible."""
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        with file.open("rb+") as f:
            os.fsync(f.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

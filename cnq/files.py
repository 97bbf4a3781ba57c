"""Writing a large file or directory completely or not at all, and knowing a file again."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.filesize import decimal

from .errors import CnqError, NoSpace, OutputExists

PARTIAL = ".partial"


@contextmanager
def replacing(dst: Path, *, force: bool = False, need: int = 0) -> Iterator[Path]:
    """Yield a path beside `dst` to write a file or a directory to; it takes dst's place when the block ends well.

    On any exception, Ctrl-C included, nothing is left behind. After a kill -9 the partial output stays and is replaced
    by the next run. `need` is the size in bytes that the disk must have room for.

    Raises OutputExists (dst is there and not `force`), NoSpace, CnqError (not writable, or another cnq writes it).
    """
    if dst.exists() and not force:
        raise OutputExists(f"{dst} exists. Add --force to replace it, or name another output.")
    partial = dst.with_name(dst.name + PARTIAL)
    lock_path = partial.with_name(partial.name + ".lock")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path, timeout=0)
        lock.acquire()
    except Timeout:
        raise CnqError(f"{dst} is being written by another cnq. Wait for it, or name another output.") from None
    except OSError as error:
        raise CnqError(f"{dst} cannot be written: {error.strerror}. Name an output in a folder you may write to.") from error
    try:
        _remove(partial)
        require_space(dst.parent, need)
        yield partial
        _settle(partial)
        if dst.is_dir() and not dst.is_symlink():
            shutil.rmtree(dst)  # rename cannot replace a directory that has files in it
        partial.replace(dst)
    except OSError as error:
        raise CnqError(f"{dst} was not written: {error.strerror or error}.") from error
    finally:
        _remove(partial)
        lock.release()
        lock_path.unlink(missing_ok=True)


def require_space(folder: Path, need: int) -> None:
    """Raise NoSpace unless the disk of `folder` (an existing directory) has `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise NoSpace(
            f"{folder}: {decimal(need)} needed, {decimal(free)} free. Make room, or name an output on another disk (--out)."
        )


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

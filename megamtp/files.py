"""Atomic writes and renames, fsync, and file locks."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from megamtp.console import print_warning

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h, linux/fs.h


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file atomically, as `open_atomically` does. Raises OSError."""
    with open_atomically(path) as stream:
        stream.write(content)


def fsync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path, temporary: Path) -> None:
    """Swaps the names of two folders, in one atomic step where the file system supports it.

    Elsewhere (NFS), `second` is first renamed to `temporary`, and for a moment no folder has its name.

    Raises:
        OSError: a folder cannot be renamed.
    """
    if not _exchange_atomically(first, second):
        os.rename(second, temporary)
        os.rename(first, second)
        os.rename(temporary, first)


def _exchange_atomically(first: Path, second: Path) -> bool:
    """Returns False if the C library, the kernel or the file system does not support it. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def take_lock(stream: IO, path: Path, advice: str) -> bool:
    """Locks an open file until it is closed. Returns False if another process holds the lock.

    Args:
        path: named in the warning.
        advice: what the user should do where files cannot be locked. There, a warning is printed and the result is
            True.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print_warning(f"{path} cannot be locked ({error.strerror}): {advice}")
    return True


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Opens a stream whose content appears at `path`, already on disk, when the block ends without an exception.

    A reader sees the old file or the new file, never a part of it, even if the process is killed.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Files and folders that are whole or not there, and files that one process at a time has."""

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
    """Writes a file so that a reader, or a run killed at any time, sees the old content, the new, or none. Raises
    OSError.
    """
    with open_atomically(path) as stream:
        stream.write(content)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path, aside: Path) -> None:
    """Gives two folders each other's name: at any time one of the two is found under either name.

    Where the file system cannot do it at once (NFS), `other` is renamed to `aside` first, and its name is free for a
    moment.

    Raises:
        OSError: one of them cannot be renamed.
    """
    if not _exchange_at_once(one, other):
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)


def _exchange_at_once(one: Path, other: Path) -> bool:
    """False if the C library, the kernel or the file system cannot. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def take_lock(stream: IO, place: Path, advice: str) -> bool:
    """Locks a file until it is closed; False if another process has it. A warning with `advice` where files cannot
    be locked.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print_warning(f"{place} cannot be locked ({error.strerror}): {advice}")
    return True


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content appears under `path` when the block ends without an exception. Raises OSError."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Which operating system errors a user can remedy, and the remedies that the messages name."""

import errno
import os

import pytest

from megamtp.errors import InputError, translate_os_error


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "run/file cannot be written: No space left on device; make room on its disk, and start again"),
        (
            errno.EDQUOT,
            "run/file cannot be written: Disk quota exceeded; make room, or ask for a larger quota, and start again",
        ),
        (errno.EFBIG, "run/file cannot be written: File too large; allow larger files (ulimit -f), and start again"),
        (
            errno.EROFS,
            "run/file cannot be written: Read-only file system; mount its file system for writing, or choose another "
            "folder, and start again",
        ),
        (
            errno.EACCES,
            "run/file cannot be used: Permission denied; change its permissions or its folder's (chmod), or choose "
            "another, and start again",
        ),
        (
            errno.EPERM,
            "run/file cannot be used: Operation not permitted; change its owner or attributes (chown, chattr), or "
            "choose another, and start again",
        ),
    ],
)
def test_each_error_names_its_own_remedy(number, message):
    error = translate_os_error(OSError(number, os.strerror(number), "run/file"))
    assert isinstance(error, InputError) and str(error) == message
    assert ("make room" in message) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_full_disk_without_a_file_name():
    assert str(translate_os_error(OSError(errno.ENOSPC, "No space left on device"))).startswith(
        "a file of the run cannot be written: No "
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),  # without a file: from a socket, for example
        OSError(errno.EPERM, "Operation not permitted"),
        OSError(errno.EIO, "Input/output error", "file"),
        OSError("no number"),
        RuntimeError("a defect"),
        InputError("found; expected"),
    ],
)
def test_other_errors_are_returned_unchanged(error):
    assert translate_os_error(error) is error

"""Errors of the system: which ones a user can remedy, and how."""

import errno
import os

import pytest

from megamtp.errors import InputError, explained


@pytest.mark.parametrize(
    ("number", "words"),
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
def test_each_error_names_its_own_remedy(number, words):
    found = explained(OSError(number, os.strerror(number), "run/file"))
    assert isinstance(found, InputError) and str(found) == words
    assert ("make room" in words) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_a_full_disk_has_no_file_name_where_an_open_file_is_written():
    assert str(explained(OSError(errno.ENOSPC, "No space left on device"))).startswith(
        "a file of the run cannot be written: No "
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),  # of a socket, say
        OSError(errno.EPERM, "Operation not permitted"),
        OSError(errno.EIO, "Input/output error", "file"),
        OSError("no number"),
        RuntimeError("a defect"),
        InputError("found; expected"),
    ],
)
def test_other_errors_stay_as_they_are(error):
    assert explained(error) is error

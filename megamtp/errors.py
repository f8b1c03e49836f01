"""Errors that a user can cause. Every other exception is a bug in megamtp and keeps its traceback."""

import errno

REMEDIES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room, or ask for a larger quota",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "mount its file system for writing, or choose another folder",
    errno.EACCES: "change its permissions or its folder's (chmod), or choose another",
    errno.EPERM: "change its owner or attributes (chown, chattr), or choose another",
}
# The system reports these without a file name if they occur while writing to an open file.
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """Bad input or configuration. The message is one line: what was found; what was expected; what to do."""


class CheckpointError(InputError):
    """A checkpoint is missing or incomplete, or it belongs to another model or another parallel layout."""


def translate_os_error(error: Exception) -> Exception:
    """Returns an InputError for an OSError that the user can remedy, and any other exception unchanged."""
    if not isinstance(error, OSError) or error.errno not in REMEDIES:
        return error
    if not error.filename and error.errno not in OUT_OF_SPACE:
        return error
    verb = "written" if error.errno in (*OUT_OF_SPACE, errno.EROFS) else "used"
    return InputError(
        f"{error.filename or 'a file of the run'} cannot be {verb}: {error.strerror}; "
        f"{REMEDIES[error.errno]}, and start again"
    )

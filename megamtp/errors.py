"""The errors a user can cause. Everything else is a defect of ours and keeps its traceback."""

import errno

REMEDIES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room, or ask for a larger quota",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "mount its file system for writing, or choose another folder",
    errno.EACCES: "change its permissions or its folder's (chmod), or choose another",
    errno.EPERM: "change its owner or attributes (chown, chattr), or choose another",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # reported without a file's name when a file that is open is written


class InputError(ValueError):
    """Bad input or configuration. The message is one line: what was found, what was expected, what to do about it."""


class CheckpointError(InputError):
    """A checkpoint that is missing, incomplete, or of another model or job layout."""


def explained(error: Exception) -> Exception:
    """An InputError in place of an OSError that the user can remedy; any other exception as it is."""
    if not isinstance(error, OSError) or error.errno not in REMEDIES or not (error.filename or error.errno in FULL):
        return error
    problem = (
        f"cannot be written: {error.strerror}"
        if error.errno in (*FULL, errno.EROFS)
        else f"cannot be used: {error.strerror}"
    )
    return InputError(f"{error.filename or 'a file of the run'} {problem}; {REMEDIES[error.errno]}, and start again")

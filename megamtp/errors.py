"""The errors a user can cause. Everything else is a defect of ours and keeps its traceback."""


class InputError(ValueError):
    """Bad input or configuration. The message is one line: what was found, what was expected, what to do about it."""


class CheckpointError(InputError):
    """A checkpoint that is missing, incomplete, or of another model or job layout."""

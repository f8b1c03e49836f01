"""What a process leaves behind that is killed at any line of some files."""

import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType


def killed_at_each_line(
    files: tuple[str, ...], prepare: Callable[[], None], action: Callable[[], None]
) -> Iterator[int]:
    """Yields after every kill: before the first line that `action` runs in one of `files`, before the second, and so
    on.

    Each time `prepare` is called first. The last process is not killed. Only for a process that has no threads: it is
    forked.
    """
    for number in range(1, 10_000):
        prepare()
        child = os.fork()
        if not child:
            _run_killed(files, action, number)
        _, status = os.waitpid(child, 0)
        yield number
        if status == 0:
            return
        assert os.WIFSIGNALED(status), f"ended with status {status}"


def _run_killed(files: tuple[str, ...], action: Callable[[], None], number: int) -> None:
    remaining = number

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        nonlocal remaining
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), 9)
        return trace

    status = 1
    try:
        sys.settrace(trace)
        action()
        status = 0
    finally:
        os._exit(status)

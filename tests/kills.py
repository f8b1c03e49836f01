"""Kills a process at each line of some files, to test what it leaves behind."""

import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType


def killed_at_each_line(
    files: tuple[str, ...], prepare: Callable[[], None], action: Callable[[], None]
) -> Iterator[int]:
    """Runs `action` in forked processes, and kills each one before another line of `files`. Yields after each process.

    The first process is killed before the first line that it runs in `files`, the second process before the second
    line, and so on. The last process finishes without being killed. `prepare` is called before each process. The
    calling process is forked, so it must not have other threads.
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

"""Ends the process of a rank: after rank 0 has reported the error, and without Python's own teardown."""

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from megamtp.cluster.environment import find_place
from megamtp.cluster.signals import SIGNALS
from megamtp.console import discard_output
from megamtp.errors import InputError, translate_os_error

# The other ranks sleep while rank 0 reports an error. Its launcher then ends them.
REPORT_SECONDS = 10


def as_rank(main: Callable[[], int]) -> Callable[[], int]:
    """Returns `main` for a process that has peers.

    If every rank has the same error, the first rank of each node reports it. The others wait before they raise it, and
    their launcher ends them meanwhile. An OSError that the user can remedy becomes an InputError. The process ends as
    soon as its exit status is known: see _end.
    """

    def main_of_rank() -> int:
        outcome: list[int] = []
        atexit.register(_end, outcome)
        try:
            status = main()
        except SystemExit as error:  # rank 0 reports why
            status = error.code if isinstance(error.code, int) else int(bool(error.code))
            if status:
                _wait_to_be_ended(REPORT_SECONDS)
        except KeyboardInterrupt:
            outcome.append(128 + signal.SIGINT)
            raise
        except (InputError, OSError) as error:
            reported = translate_os_error(error)
            if not isinstance(reported, InputError):
                raise
            with suppress(InputError):  # the launcher's variables may be the error
                if local_rank := find_place().local_rank:
                    _wait_to_be_ended(REPORT_SECONDS + local_rank)
            outcome.append(2)
            raise reported from None
        finally:
            for stream in (sys.stdout, sys.stderr):
                _drop_unwritable(stream)
        outcome.append(status)
        return status

    return main_of_rank


def close_communicators() -> None:
    """Closes torch.distributed's communicators. Collective.

    Do not call it after an error: if only one rank has the error, the others would not call it.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _wait_to_be_ended(seconds: float) -> None:
    """Sleeps until the launcher's signal ends this process, which has nothing more to save, or the time has passed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(seconds)


def _drop_unwritable(stream: TextIO | None) -> None:
    """Drops the last output of a stream that cannot be written, because this must not make a run fail."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        discard_output(stream)


def _end(outcome: list[int]) -> None:
    """Ends the process before Python's own teardown, if its exit status is known.

    DeepSpeed's globals keep gloo's threads alive after destroy_process_group. A thread that then releases the last
    tensor of a collective aborts the process (torch 2.11: ProcessGroupGloo::runLoop, decref_pyobject,
    PyEval_AcquireThread).
    """
    if outcome:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):
                stream.flush()
        os._exit(outcome[0])

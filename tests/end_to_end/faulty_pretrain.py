"""Entries of megamtp.pretrain for `pretrain` in jobs.py: an error of one rank, and a full disk."""

import importlib
import os
import resource
import time

from megamtp import pretrain
from megamtp.cluster import exiting
from megamtp.errors import CheckpointError


def fail_on_rank_1(module: str, name: str) -> None:
    """Trains, but the function or method `name` of a module fails on rank 1."""
    exiting.REPORT_SECONDS = 1
    if os.environ["RANK"] == "1":
        *owners, function = name.split(".")
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, function, _fail)
    pretrain.entry()


def _fail(*_: object) -> None:
    raise CheckpointError("damaged since the run began")


def limit_files(num_bytes: int) -> None:
    """Trains with a limit of `num_bytes` per file, which acts as a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    pretrain.entry()


def limit_files_and_slow_tensorboard(num_bytes: int) -> None:
    """Also slows down TensorBoard's thread, which then has not yet written all events when the run fails."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write

    def slow_write(*data: object) -> None:
        time.sleep(0.02)
        write(*data)

    RecordWriter.write = slow_write
    limit_files(num_bytes)

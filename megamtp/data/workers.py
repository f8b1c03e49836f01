"""Who tokenises the shards: this process, worker processes of this machine, or the other ranks of an MPI job."""

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

from tqdm import tqdm

from megamtp.data.jobs import TokenisationJob
from megamtp.data.parts import is_finished, tokenise
from megamtp.data.shards import Shard
from megamtp.errors import InputError

PR_SET_PDEATHSIG = 1  # Linux, sys/prctl.h
# Set by the launchers of Open MPI, and of MPICH and its relatives.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def tokenise_all(shards: list[Shard], job: TokenisationJob, workers: int | Executor) -> None:
    """Writes the parts that are missing, with a progress bar if stderr is a terminal.

    Args:
        workers: number of processes; one works here. Or an executor with workers of its own.

    Raises:
        InputError: of the first shard that has a mistake, or a worker was killed. Parts that were begun are finished
            first.
        OSError: a part cannot be written.
    """
    missing = [shard for shard in shards if not is_finished(shard, job)]
    total = sum(shard.num_bytes for shard in shards)
    done = total - sum(shard.num_bytes for shard in missing)
    shown = {
        "total": total,
        "initial": done,
        "unit": "B",
        "unit_scale": True,
        "desc": "tokenising",
        "dynamic_ncols": True,
    }
    # Processes are forked before the bar starts its thread: a fork copies the locks that a thread holds, but not the
    # thread.
    with _executor(workers, len(missing)) as executor, tqdm(**shown, disable=None) as bar:
        if executor:
            _collect([executor.submit(tokenise, shard, job) for shard in missing], bar)
        else:
            for shard in missing:
                bar.update(tokenise(shard, job))


def _collect(futures: list[Future], bar: tqdm) -> None:
    try:
        for future in as_completed(futures):
            bar.update(future.result())
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, perhaps for want of memory; expected all to finish: call again, it goes on "
            "from there, and fewer --workers need less memory"
        ) from None
    except (InputError, OSError):
        for future in futures:
            future.cancel()
        wait([future for future in futures if not future.cancelled()])
        for future in futures:  # the first in the inputs' order
            if not future.cancelled():
                future.result()
        raise


def _executor(workers: int | Executor, num_shards: int) -> AbstractContextManager[Executor | None]:
    """None: this process works alone."""
    if isinstance(workers, Executor):
        return nullcontext(workers)
    number = min(workers, num_shards)
    return _processes(number) if number > 1 else nullcontext()


@contextmanager
def _processes(number: int) -> Iterator[Executor]:
    if tqdm.monitor:  # the thread that earlier bars have started; the next bar starts another
        tqdm.monitor.exit()
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(number, multiprocessing.get_context("fork"), _end_with, (os.getpid(),))
    try:
        with _interrupted_later():
            executor.submit(os.getpid)  # forks all workers; what interrupts a fork is lost in one of Python's own hooks
        yield executor
    except KeyboardInterrupt:  # begun parts are not waited for
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C within the block interrupts at its end. Only the main thread is ever interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if noted:
        signal.raise_signal(signal.SIGINT)


def _end_with(parent: int) -> None:
    """Ends this worker when the process that started it dies, even of SIGKILL, and leaves Ctrl-C to that one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != parent:
        os._exit(1)


def num_mpi_ranks() -> int:
    """Of the MPI job that this process is of; 1 if it was not started by mpirun."""
    return max(int(os.environ.get(variable) or 1) for variable in MPI_SIZES)


@contextmanager
def mpi_ranks() -> Iterator[Executor | None]:
    """On rank 0 an executor of the other ranks' work; on those, which have then worked until rank 0 left this block,
    None.

    Raises:
        InputError: mpi4py is not installed.
    """
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except ImportError:
        raise InputError("started by mpirun, but mpi4py is not installed; run: pip install 'megamtp[mpi]'") from None
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield cast("Executor | None", executor)  # mpi4py's types have the context manager itself here

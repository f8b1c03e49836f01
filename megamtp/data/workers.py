"""Runs tokenisation in this process, in worker processes of this machine, or on the other ranks of an MPI job."""

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

from megamtp.data.shards import Shard
from megamtp.data.tokenisation import TokenisationTask
from megamtp.data.tokenised_shards import is_tokenised, tokenise
from megamtp.errors import InputError

PR_SET_PDEATHSIG = 1  # Linux, sys/prctl.h
# The first is set by Open MPI's launcher, the second by the launchers of MPICH and its derivatives.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def tokenise_all(shards: list[Shard], task: TokenisationTask, workers: int | Executor) -> None:
    """Tokenises the shards that are not tokenised yet, with a progress bar if stderr is a terminal.

    After an error, shards that are being tokenised are finished first.

    Args:
        workers: the number of processes, of which 1 means this process, or an executor.

    Raises:
        InputError: an input is bad (the error of the first such shard in the inputs' order), or a worker was killed.
        OSError: a file cannot be written.
    """
    missing = [shard for shard in shards if not is_tokenised(shard, task)]
    total = sum(shard.num_bytes for shard in shards)
    done = total - sum(shard.num_bytes for shard in missing)
    bar_options = {
        "total": total,
        "initial": done,
        "unit": "B",
        "unit_scale": True,
        "desc": "tokenising",
        "dynamic_ncols": True,
    }
    # Processes must be forked before the bar starts its thread. A fork copies the locks that a thread holds, but not
    # the thread that would release them.
    with _executor(workers, len(missing)) as executor, tqdm(**bar_options, disable=None) as bar:
        if executor:
            _collect([executor.submit(tokenise, shard, task) for shard in missing], bar)
        else:
            for shard in missing:
                bar.update(tokenise(shard, task))


def _collect(futures: list[Future], bar: tqdm) -> None:
    try:
        for future in as_completed(futures):
            bar.update(future.result())
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, perhaps because memory ran out; expected all workers to finish: run the "
            "command again to resume, with fewer --workers to use less memory"
        ) from None
    except (InputError, OSError):
        for future in futures:
            future.cancel()
        wait([future for future in futures if not future.cancelled()])
        for future in futures:  # raises the first error in the inputs' order
            if not future.cancelled():
                future.result()
        raise


def _executor(workers: int | Executor, num_shards: int) -> AbstractContextManager[Executor | None]:
    """Returns a context manager of the executor, or of None if this process does all the work."""
    if isinstance(workers, Executor):
        return nullcontext(workers)
    num_processes = min(workers, num_shards)
    return _processes(num_processes) if num_processes > 1 else nullcontext()


@contextmanager
def _processes(num_processes: int) -> Iterator[Executor]:
    if tqdm.monitor:  # a thread that earlier bars have started; the next bar starts it again
        tqdm.monitor.exit()
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("fork"), _initialise_worker, (os.getpid(),)
    )
    try:
        # The first submit forks all workers. Python's at-fork hooks would swallow a KeyboardInterrupt.
        with _interrupts_delayed():
            executor.submit(os.getpid)
        yield executor
    except KeyboardInterrupt:  # do not wait for shards that are being tokenised
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_delayed() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block. Only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        signal.raise_signal(signal.SIGINT)


def _initialise_worker(parent: int) -> None:
    """Makes this worker ignore Ctrl-C, and end when its parent process ends, even by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != parent:
        os._exit(1)


def num_mpi_ranks() -> int:
    """Returns the number of ranks of this process's MPI job; 1 if mpirun did not start it."""
    return max(int(os.environ.get(variable) or 1) for variable in MPI_SIZES)


@contextmanager
def mpi_ranks() -> Iterator[Executor | None]:
    """Yields on rank 0 an executor that runs work on the other ranks, and None on the other ranks.

    The other ranks enter the block only after rank 0 has left it.

    Raises:
        InputError: mpi4py is not installed.
    """
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except ImportError:
        raise InputError("started by mpirun, but mpi4py is not installed; run: pip install 'megamtp[mpi]'") from None
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield cast("Executor | None", executor)  # mpi4py's type annotations name the context manager itself

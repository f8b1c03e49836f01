"""Runs a function on several gloo ranks: `run_ranks(function, 2, argument)` returns the result of each rank.

Ranks are forked from a server process that has already imported torch and DeepSpeed, so a two-rank test takes seconds.
"""

import contextlib
import gc
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "TRUE")
fork_server = get_context("forkserver")
fork_server.set_forkserver_preload(
    [
        "torch",
        "deepspeed",
        "tests.ranks",
        "megamtp.engines.build",
        # Imports torch's compiler, which takes two seconds; otherwise every engine's optimizer imports it.
        "deepspeed.runtime.zero.muon.original_muon",
        "matplotlib.figure",  # all benchmarks import it, which takes a second
        "deepspeed.module_inject.auto_ep_layer",  # every engine imports it
    ]
)


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 250, backend: str = "gloo"
) -> list[Any]:
    """Calls function(*arguments) on every CPU rank, and returns the result of each rank.

    Args:
        function: a top-level function of a module.
        backend: gloo, ordered (see ordered_backend.py), or none if the function initialises torch.distributed itself.

    Raises:
        AssertionError: a rank failed. The message has the tracebacks of all failed ranks.
    """
    return _run(fork_server, backend, function, world_size, arguments, timeout_seconds)


def run_gpu_rank(
    function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 250, backend: str = "nccl"
) -> Any:
    """Calls function(*arguments) in a new process with one GPU, and returns its result.

    Args:
        backend: nccl, or none if the function initialises torch.distributed itself.
    """
    (result,) = run_gpu_ranks(function, 1, *arguments, timeout_seconds=timeout_seconds, backend=backend)
    return result


def run_gpu_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 250, backend: str = "nccl"
) -> list[Any]:
    """Like run_ranks, with one GPU per rank."""
    return _run(get_context("spawn"), backend, function, world_size, arguments, timeout_seconds, accelerator="cuda")


def _run(
    context,
    backend: str,
    function: Callable[..., Any],
    world_size: int,
    arguments: tuple,
    timeout_seconds: float,
    accelerator="cpu",
) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank_main, args=(backend, function, arguments, rank, world_size, folder))
            for rank in range(world_size)
        ]
        with _accelerator(accelerator):
            for process in processes:
                process.start()
        failures = _wait(processes, Path(folder), timeout_seconds)
        assert not failures, "\n".join(failures)
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world_size)]


@contextlib.contextmanager
def _accelerator(name: str) -> Iterator[None]:
    """Sets DS_ACCELERATOR for processes started in the block. DeepSpeed reads it once, when it is imported."""
    before = os.environ["DS_ACCELERATOR"]
    os.environ["DS_ACCELERATOR"] = name
    try:
        yield
    finally:
        os.environ["DS_ACCELERATOR"] = before


def _wait(processes: list, folder: Path, timeout_seconds: float) -> list[str]:
    """Waits for all ranks, and returns their failures. If a rank fails, kills the others, which would wait forever."""
    remaining = timeout_seconds
    while any(process.is_alive() for process in processes) and remaining > 0:
        if any(process.exitcode for process in processes):
            break
        running = next((process for process in processes if process.is_alive()), None)
        if running:
            running.join(0.1)
        remaining -= 0.1
    failures = []
    for rank, process in enumerate(processes):
        if process.is_alive() and not any(other.exitcode for other in processes):
            failures.append(f"rank {rank} was still running after {timeout_seconds} s")
        process.join(2.0)
        if process.is_alive():
            process.kill()
            process.join()
        report = folder / f"traceback{rank}"
        if report.exists():
            failures.append(f"rank {rank}:\n{report.read_text()}")
        elif process.exitcode and not failures:
            failures.append(f"rank {rank} exited with status {process.exitcode}")
    return failures


def _rank_main(
    backend: str, function: Callable[..., Any], arguments: tuple, rank: int, world_size: int, folder: str
) -> None:
    import torch
    import torch.distributed as dist
    from deepspeed.ops import __compatible_ops__

    from tests import ordered_backend

    __compatible_ops__["deepspeed_shm_comm"] = False
    ordered_backend.register()
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage for each engine: 0.2 s if that scans the modules of the server, too
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if os.environ["DS_ACCELERATOR"] == "cuda":
        torch.cuda.set_device(rank)
    try:
        if backend != "none":
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        result = function(*arguments)
        (Path(folder) / f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"traceback{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None

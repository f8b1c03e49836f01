"""Finds the rank of this process, and ends all ranks together if one has an error.

Works under the deepspeed launcher, torchrun, mpirun and Slurm, and without a launcher.
"""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from megamtp.cluster.ports import reserve_port
from megamtp.config import ClusterConfig
from megamtp.errors import InputError, translate_os_error

T = TypeVar("T")
# (rank, local rank, world size) as set by torch-style launchers, Open MPI, and MPICH, Intel MPI (Hydra) or Slurm's PMI.
VARIABLES = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
)


@dataclass(frozen=True)
class Place:
    """The rank of this process on its node and in the job, known before torch.distributed is initialised."""

    rank: int
    local_rank: int
    world_size: int


def find_place() -> Place:
    """Returns the place that the launcher's environment variables say; without such variables, that of a single rank.

    Raises:
        InputError: a variable is not a number, or the rank is not below the number of ranks.
    """
    for rank, local_rank, world_size in VARIABLES:
        if os.environ.get(rank) and os.environ.get(world_size):  # a single variable belongs to another program
            own_rank, num_ranks = _number(rank), _number(world_size, 1)
            if own_rank >= num_ranks:
                raise InputError(
                    f"{rank}={own_rank} with {world_size}={num_ranks}; expected a rank below the number of ranks"
                )
            # Slurm's PMI has no variable for the local rank.
            local = next((name for name in (local_rank, "SLURM_LOCALID") if os.environ.get(name)), rank)
            if num_ranks > 1 and os.environ.get("MASTER_PORT"):
                _number("MASTER_PORT", 1, 65535)
            return Place(own_rank, _number(local), num_ranks)
    return Place(0, 0, 1)


def _number(variable: str, smallest: int = 0, largest: int = 2**31 - 1) -> int:
    value = os.environ[variable]
    if not re.fullmatch("[0-9]{1,10}", value) or not smallest <= int(value) <= largest:
        raise InputError(
            f"{variable}={value} in the environment; expected {smallest} to {largest}: let a launcher set it"
        )
    return int(value)


def place_in_cluster(place: Place, cluster: ClusterConfig) -> Place:
    """Returns rank 0 of the emulated cluster if cluster.emulate is set, and otherwise `place`.

    Raises:
        InputError: this process has real peers.
    """
    if not cluster.emulate:
        return place
    if place.world_size > 1:
        raise InputError(
            f"cluster.emulate={cluster.emulate} under a launcher of {place.world_size} ranks; expected one process"
        )
    return Place(0, 0, cluster.emulate)


@contextmanager
def errors_shared(place: Place) -> Iterator[None]:
    """Ends every rank if the block raises an exception on any of them. Needs no torch.distributed: see _share_error."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    _share_error(place, error)


def _share_error(place: Place, error: Exception | None) -> None:
    """Raises this rank's own error. Under mpirun every rank ends if any has an error: see _end_together.

    Other launchers end all ranks when one has failed. Under mpirun, the other ranks may wait forever. The ranks then
    exchange their errors over MPI, together with the address of rank 0, which mpirun does not provide. MPI is finalized
    at once: a rank that finalizes MPI at its exit waits until all ranks do so, even ranks that wait for this rank.
    """
    if place.world_size == 1 or (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        if error:
            raise error
        return
    try:
        import mpi4py
    except ImportError:
        raise InputError(
            f"{place.world_size} ranks but no MASTER_ADDR and MASTER_PORT, and no mpi4py to ask mpirun's ranks: pip "
            "install mpi4py"
        ) from None
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    if MPI.COMM_WORLD.size != place.world_size:
        raise InputError(
            f"{place.world_size} ranks by the environment, but neither MASTER_ADDR and MASTER_PORT nor MPI; expected a "
            "launcher that sets them"
        )
    # The name, not the address: on its own host a name may resolve to 127.0.1.1, which other hosts cannot reach.
    address = (socket.gethostname(), reserve_port()) if place.rank == 0 else None
    shared = MPI.COMM_WORLD.allgather((_shared_message(error), address))
    MPI.Finalize()
    _end_together(place.rank, error, [message for message, _ in shared])
    host, port = shared[0][1]
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


@contextmanager
def raised_by_all() -> Iterator[None]:
    """Ends every rank if the block raises an exception on any of them: see _end_together.

    Collective at its end. The block itself must not call collectives.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    _end_together(dist.get_rank(), error, of_all_ranks(_shared_message(error)))


def _shared_message(error: Exception | None) -> str | None:
    """Returns the message of an error for the other ranks: "" if the error is a defect, None without an error."""
    if error is None:
        return None
    error = translate_os_error(error)
    return str(error) if isinstance(error, InputError) else ""


def _end_together(rank: int, error: Exception | None, messages: list[str | None]) -> None:
    """Returns if no rank has an error; otherwise raises on every rank.

    A rank with a defect raises it, with its traceback. Rank 0 raises the first InputError, which is then printed once.
    The other ranks raise SystemExit(2).

    Args:
        messages: the result of _shared_message on every rank.
    """
    if all(message is None for message in messages):
        return
    if error and (rank == 0 or messages[rank] == ""):
        raise error
    if rank == 0 and any(messages):
        raise InputError(next(filter(None, messages)))
    raise SystemExit(2)


def of_all_ranks(own: T) -> list[T]:
    """Returns the values of all ranks, by rank. Collective."""
    values = [own] * dist.get_world_size()
    dist.all_gather_object(values, own)
    return values

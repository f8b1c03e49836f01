"""Which rank this process is: under the deepspeed launcher, torchrun, mpirun, or alone."""

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
# (rank, local rank, world size) as torch-style launchers, Open MPI, MPICH/Intel MPI (Hydra) and Slurm's PMI spell them.
SPELLINGS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
)


@dataclass(frozen=True)
class Place:
    """This process among its peers, known before any of them is talked to."""

    rank: int
    local_rank: int
    world_size: int


def find_place() -> Place:
    """Reads the launcher's environment variables; without any, this is the only rank.

    Raises:
        InputError: they hold no numbers, or none of a rank.
    """
    for rank, local_rank, world_size in SPELLINGS:
        if os.environ.get(rank) and os.environ.get(world_size):  # one alone is some other program's
            own_rank, num_ranks = _number(rank), _number(world_size, 1)
            if own_rank >= num_ranks:
                raise InputError(
                    f"{rank}={own_rank} with {world_size}={num_ranks}; expected a rank below the number of ranks"
                )
            # Slurm's PMI tells none
            local = next((name for name in (local_rank, "SLURM_LOCALID") if os.environ.get(name)), rank)
            if num_ranks > 1 and os.environ.get("MASTER_PORT"):
                _number("MASTER_PORT", 1, 65535)
            return Place(own_rank, _number(local), num_ranks)
    return Place(0, 0, 1)


def _number(variable: str, smallest: int = 0, largest: int = 2**31 - 1) -> int:
    found = os.environ[variable]
    if not re.fullmatch("[0-9]{1,10}", found) or not smallest <= int(found) <= largest:
        raise InputError(
            f"{variable}={found} in the environment; expected {smallest} to {largest}: let a launcher set it"
        )
    return int(found)


def emulated_place(place: Place, cluster: ClusterConfig) -> Place:
    """The place in the emulated cluster, if there is one: rank 0.

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


def share_error(place: Place, error: Exception | None) -> None:
    """Raises this rank's own error; under mpirun every rank ends if any has one: see _end_together.

    Other launchers end all ranks when one has failed. mpirun may let the others wait for it for ever, so there the
    ranks tell each other over MPI, and in the same message where to meet, which mpirun does not tell them. Then MPI is
    left for good: at its exit a rank would otherwise wait for all others to leave it, also for those that wait for this
    one.
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
    # By name, which each rank resolves for itself: on its own host a name may stand for 127.0.1.1, which is of no use
    # on others.
    address = (socket.gethostname(), reserve_port()) if place.rank == 0 else None
    told = MPI.COMM_WORLD.allgather((_told(error), address))
    MPI.Finalize()
    _end_together(place.rank, error, [message for message, _ in told])
    host, port = told[0][1]
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


@contextmanager
def raised_by_all() -> Iterator[None]:
    """Ends every rank when the block raises an exception on any of them: see _end_together.

    Collective at its end; the block must not be.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    _end_together(dist.get_rank(), error, of_all_ranks(_told(error)))


def _told(error: Exception | None) -> str | None:
    """What a rank tells the others of its error: an InputError's message; nothing but that there is one of any
    other.
    """
    if error is None:
        return None
    error = translate_os_error(error)
    return str(error) if isinstance(error, InputError) else ""


def _end_together(rank: int, error: Exception | None, told: list[str | None]) -> None:
    """Returns if no rank has an error. Otherwise a defect is raised on its own rank, with its traceback, and the first
    InputError on rank 0, so that it is printed once; the other ranks raise SystemExit(2).

    Args:
        told: what _told returns, by rank.
    """
    if all(message is None for message in told):
        return
    if error and (rank == 0 or told[rank] == ""):
        raise error
    if rank == 0 and any(told):
        raise InputError(next(filter(None, told)))
    raise SystemExit(2)


def of_all_ranks(own: T) -> list[T]:
    """What every rank gives, by rank. Collective."""
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found

"""Which rank this process is: under the deepspeed launcher, torchrun, mpirun, or alone."""

import os
import socket
from dataclasses import dataclass
from typing import TypeVar

from megamtp.cluster import emulated
from megamtp.config import ClusterConfig
from megamtp.errors import InputError

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
    """Reads the launcher's environment variables; without any, this is the only rank."""
    for rank, local_rank, world_size in SPELLINGS:
        if rank in os.environ and world_size in os.environ:  # one alone is some other program's
            own_rank = int(os.environ[rank])
            return Place(own_rank, int(os.environ.get(local_rank, own_rank)), int(os.environ[world_size]))
    return Place(0, 0, 1)


def emulated_place(place: Place, cluster: ClusterConfig) -> Place:
    """The place in the emulated cluster, if there is one: rank 0.

    Raises:
        InputError: this process has real peers.
    """
    if not cluster.emulate:
        return place
    if place.world_size > 1:
        raise InputError(f"cluster.emulate={cluster.emulate} under a launcher of {place.world_size} ranks; expected one process")
    return Place(0, 0, cluster.emulate)


def join_peers(place: Place, cluster: ClusterConfig) -> None:
    """Initialises torch.distributed: NCCL on GPUs, gloo without, or the emulated cluster. Collective."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)  # engines build on the current device, before DeepSpeed chooses this rank's
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    # DeepSpeed compiles a shared-memory collective for CPU ranks at first use; gloo does not need it, and there may be no compiler.
    compatible_ops["deepspeed_shm_comm"] = False
    _announce(place)
    if cluster.emulate:
        emulated.join(cluster)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def _announce(place: Place) -> None:
    """Sets the variables that torch.distributed reads, where the launcher has not."""
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_free_port()),
    }


def share_error(place: Place, error: InputError | None) -> None:
    """Raises this rank's own error; under mpirun rank 0 raises the first of any rank's, and the others exit with status 2.

    Other launchers end all ranks when one has failed. mpirun may let the others wait for it for ever, so there the ranks tell each
    other over MPI, and in the same message where to meet, which mpirun does not tell them. Then MPI is left for good: at its exit
    a rank would otherwise wait for all others to leave it, also for those that wait for this one.
    """
    if place.world_size == 1 or "MASTER_ADDR" in os.environ:
        if error:
            raise error
        return
    try:
        import mpi4py
    except ImportError:
        raise InputError(
            f"{place.world_size} ranks but no MASTER_ADDR, and no mpi4py to ask mpirun's ranks: pip install mpi4py"
        ) from None
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    if MPI.COMM_WORLD.size != place.world_size:
        raise InputError(
            f"{place.world_size} ranks by the environment, but no MASTER_ADDR and no MPI; expected a launcher that sets both"
        )
    address = (socket.gethostbyname(socket.gethostname()), _free_port()) if place.rank == 0 else None
    told = MPI.COMM_WORLD.allgather((error and str(error), address))
    MPI.Finalize()
    errors = [message for message, _ in told if message]
    if errors and place.rank == 0:
        raise InputError(errors[0])
    if errors:
        raise SystemExit(2)
    host, port = told[0][1]
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


def of_all_ranks(own: T) -> list[T]:
    """What every rank gives, by rank. Collective."""
    import torch.distributed as dist

    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]

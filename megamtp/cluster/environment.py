"""Which rank this process is: under the deepspeed launcher, torchrun, mpirun, or alone."""

import os
import socket
from dataclasses import dataclass

from megamtp.cluster import emulated
from megamtp.config import ClusterConfig
from megamtp.errors import InputError

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

    if not torch.cuda.is_available():
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
    if place.world_size > 1 and "MASTER_ADDR" not in os.environ:
        _ask_mpi_for_master()
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_free_port()),
    }


def _ask_mpi_for_master() -> None:
    """mpirun names no meeting point: rank 0 chooses one and tells the others over MPI, which is then left for good.

    At its exit a rank would otherwise wait for all others to leave MPI, also for those that wait for this failed one.
    """
    import mpi4py

    mpi4py.rc.finalize = False
    from mpi4py import MPI

    address = (socket.gethostbyname(socket.gethostname()), _free_port()) if MPI.COMM_WORLD.rank == 0 else None
    host, port = MPI.COMM_WORLD.bcast(address, root=0)
    MPI.Finalize()
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]

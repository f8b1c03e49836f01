"""How the ranks of a job meet: through DeepSpeed, which wraps torch.distributed.

Tests: tests/unit/cluster/test_emulated.py, tests/end_to_end/test_bad_input.py, tests/end_to_end/test_signals.py.
"""

import os

import torch
import torch.distributed as dist

from megamtp.cluster import emulated
from megamtp.cluster.environment import Place
from megamtp.cluster.ports import reserve_port
from megamtp.config import ClusterConfig
from megamtp.errors import InputError


def join_peers(place: Place, cluster: ClusterConfig) -> None:
    """Initialises torch.distributed: NCCL on GPUs, gloo without, or the emulated cluster. Collective.

    Raises:
        InputError: the ranks cannot meet at MASTER_ADDR and MASTER_PORT.
    """
    if torch.cuda.is_available():
        # engines build on the current device, before DeepSpeed chooses this rank's
        torch.cuda.set_device(place.local_rank)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Imported here, after DS_ACCELERATOR is set, which DeepSpeed reads when it is imported.
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    # DeepSpeed compiles a shared-memory collective for CPU ranks at first use; gloo does not need it, and there may be
    # no compiler.
    compatible_ops["deepspeed_shm_comm"] = False
    _announce(place)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if cluster.emulate:
        emulated.join(cluster)
    try:
        store = None if cluster.emulate else _store(place)
        if store:
            device = torch.device("cuda", place.local_rank) if backend == "nccl" else None  # as DeepSpeed does
            dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.world_size, device_id=device
            )
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        reason = str(error).splitlines()[0].rpartition("message: ")[2]
        raise InputError(
            f"rank {place.rank} cannot meet the others at MASTER_ADDR={address}, MASTER_PORT={port}: {reason}; "
            "expected the host of rank 0 and a free port: choose another (--master_port of deepspeed, --master-port "
            "of torchrun)"
        ) from None


def _store(place: Place) -> dist.Store | None:
    """Where ranks find each other's addresses, if it is not the one that DeepSpeed opens at MASTER_ADDR and
    MASTER_PORT.
    """
    if place.world_size == 1:
        return dist.HashStore()  # in this process, so that the address may be taken, or another host's
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0"
    if restarts == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    # torchrun keeps its store, with the addresses of the ranks that ended, when it starts ranks again: use other names
    # in it.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), place.world_size, is_master=False)
    return dist.PrefixStore(f"start {restarts}", store)


def _announce(place: Place) -> None:
    """Sets the variables that torch.distributed reads, where the launcher has not."""
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(reserve_port()),
    }

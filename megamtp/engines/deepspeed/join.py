"""Initialises torch.distributed through DeepSpeed, which wraps it.

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
    """Initialises torch.distributed: NCCL on GPUs, gloo on CPUs, or the emulated cluster. Collective.

    Raises:
        InputError: the ranks cannot connect to MASTER_ADDR and MASTER_PORT.
    """
    if torch.cuda.is_available():
        # Code that runs before DeepSpeed chooses this rank's device uses the current device.
        torch.cuda.set_device(place.local_rank)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed reads DS_ACCELERATOR when it is imported.
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    # DeepSpeed would compile a shared-memory collective for CPU ranks at its first use. gloo works without it, and the
    # machine may have no compiler.
    compatible_ops["deepspeed_shm_comm"] = False
    _set_variables(place)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if cluster.emulate:
        emulated.join(cluster)
    try:
        store = None if cluster.emulate else _store(place)
        if store:
            # DeepSpeed passes the same device_id.
            device = torch.device("cuda", place.local_rank) if backend == "nccl" else None
            dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.world_size, device_id=device
            )
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        reason = str(error).splitlines()[0].rpartition("message: ")[2]
        raise InputError(
            f"rank {place.rank} cannot connect to the other ranks at MASTER_ADDR={address}, MASTER_PORT={port}: "
            f"{reason}; expected the host of rank 0 and a free port: choose another (--master_port of deepspeed, "
            "--master-port of torchrun)"
        ) from None


def _store(place: Place) -> dist.Store | None:
    """Returns the store for the ranks' addresses, or None for DeepSpeed's store at MASTER_ADDR and MASTER_PORT."""
    if place.world_size == 1:
        return dist.HashStore()  # works even if the address is in use, or belongs to another host
    num_restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0"
    if num_restarts == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    # torchrun restarts ranks with the same store, which still has the addresses of the previous ranks. The prefix
    # separates the new addresses from them.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), place.world_size, is_master=False)
    return dist.PrefixStore(f"start {num_restarts}", store)


def _set_variables(place: Place) -> None:
    """Sets the environment variables that torch.distributed reads, if the launcher has not set them."""
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(reserve_port()),
    }

"""The emulated cluster: predicted times by hand, and what one step of one rank of many sends."""

import pytest

from megamtp.cluster.environment import Place, emulated_place
from megamtp.cluster.network import Network
from megamtp.config import ClusterConfig, EfficiencyConfig
from megamtp.errors import InputError
from tests.cases import global_batch, own_share, small_config
from tests.ranks import run_ranks

GIGABYTE = 10**9


@pytest.mark.parametrize(
    ("kind", "passes"), [("all_gather", 1), ("reduce_scatter", 2), ("all_reduce", 2), ("broadcast", 1), ("barrier", 0)]
)
def test_flat_network(kind, passes):
    """Reductions at half the bandwidth count twice; an all-reduce is a reduction and a gather."""
    cluster = ClusterConfig(
        emulate=64, flat_bandwidth=100e9, latency=1e-3, efficiency=EfficiencyConfig(reduce_scatter=0.5)
    )
    expected = 1e-3 + passes * GIGABYTE * 63 / 64 / 100e9
    assert Network(cluster).seconds(kind, GIGABYTE) == pytest.approx(expected)


def test_nodes_are_as_fast_as_their_slower_part():
    cluster = ClusterConfig(latency=0.0, ranks_per_node=8, node_bandwidth=400e9, network_bandwidth=50e9)

    def seconds(world_size: int) -> float:
        return Network(ClusterConfig(**{**vars(cluster), "emulate": world_size})).seconds("all_gather", GIGABYTE)

    assert seconds(1) == 0.0
    assert seconds(4) == pytest.approx(GIGABYTE * 3 / 4 / 400e9)
    assert seconds(8) == pytest.approx(GIGABYTE * 7 / 8 / 400e9)
    # Two nodes: half of the bytes enter through 8 links of 50e9 together; inside, 15/16 of them over 400e9.
    assert seconds(16) == pytest.approx(GIGABYTE * 15 / 16 / 400e9)
    slow = ClusterConfig(**{**vars(cluster), "emulate": 64, "network_bandwidth": 10e9})
    assert Network(slow).seconds("all_gather", GIGABYTE) == pytest.approx(GIGABYTE * 7 / 8 / 80e9)


def _transfers_of_a_step(world_size: int) -> list[tuple[str, int, float]]:
    from megamtp.cluster import emulated
    from megamtp.engines.deepspeed.join import join_peers
    from megamtp.engines.zero import ZeroEngine

    config = small_config(
        world_size,
        engine__kind="zero3",
        cluster__emulate=world_size,
        cluster__flat_bandwidth=1e9,
        cluster__latency=0,
        model__num_future_tokens=2,
        train__precision="bf16",
    )
    logs = []
    join = emulated.join
    emulated.join = lambda cluster: logs.append(join(cluster))
    join_peers(emulated_place(Place(0, 0, 1), config.cluster), config.cluster)
    engine = ZeroEngine(config)
    for step in range(3):
        logs[0].clear()
        engine.train_batch(own_share(global_batch(config, step, 1), 0, 1), [40, 40], lr=1e-3)
    return [(transfer.kind, transfer.num_bytes, transfer.seconds) for transfer in logs[0]]


@pytest.mark.parametrize("world_size", [2, 64])
def test_bytes_counts_and_times_of_a_step(world_size):
    """3 trunk layers, 2 heads, embedding and unembedding, in bf16: each shard of a parameter is padded to whole
    elements.
    """
    (found,) = run_ranks(_transfers_of_a_step, 1, world_size, backend="none")

    def padded(*sizes: int) -> int:
        return 2 * sum(-(-size // world_size) * world_size for size in sizes)

    layer = padded(16, 16, *[256] * 4, *[24 * 16] * 3)
    embedding, unembedding = padded(97 * 16), padded(16, 97 * 16)
    gathers = [num_bytes for kind, num_bytes, _ in found if kind == "all_gather"]
    reductions = [num_bytes for kind, num_bytes, _ in found if kind == "reduce_scatter"]
    # Forward: everything once. Backward: the trunk again; heads and unembedding are kept, the embedding is not needed.
    assert sorted(gathers) == sorted([embedding, unembedding, *[layer] * (3 + 2 + 3)])
    assert sorted(reductions) == sorted([embedding, unembedding, *[layer] * (3 + 2)])
    for kind, num_bytes, seconds in found:
        if kind in ("all_gather", "reduce_scatter"):
            assert seconds == pytest.approx(num_bytes * (world_size - 1) / world_size / 1e9)


def test_an_emulated_cluster_has_one_process():
    assert emulated_place(Place(1, 1, 2), ClusterConfig()) == Place(1, 1, 2)
    assert emulated_place(Place(0, 0, 1), ClusterConfig(emulate=64)) == Place(0, 0, 64)
    with pytest.raises(InputError, match="expected one process"):
        emulated_place(Place(0, 0, 2), ClusterConfig(emulate=64))

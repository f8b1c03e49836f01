"""Tests of the predicted times of collectives, computed by hand."""

import pytest

from megamtp.cluster.network import Network
from megamtp.config import ClusterConfig, EfficiencyConfig

GIGABYTE = 10**9


@pytest.mark.parametrize(
    ("kind", "passes"), [("all_gather", 1), ("reduce_scatter", 2), ("all_reduce", 2), ("broadcast", 1), ("barrier", 0)]
)
def test_flat_network(kind, passes):
    """A reduce-scatter at half the bandwidth counts twice; an all-reduce is a reduce-scatter and an all-gather."""
    cluster = ClusterConfig(
        emulate=64, flat_bandwidth=100e9, latency=1e-3, efficiency=EfficiencyConfig(reduce_scatter=0.5)
    )
    expected = 1e-3 + passes * GIGABYTE * 63 / 64 / 100e9
    assert Network(cluster).seconds(kind, GIGABYTE) == pytest.approx(expected)


def test_slower_of_node_and_network_determines_the_time():
    cluster = ClusterConfig(latency=0.0, ranks_per_node=8, node_bandwidth=400e9, network_bandwidth=50e9)

    def seconds(world_size: int) -> float:
        return Network(ClusterConfig(**{**vars(cluster), "emulate": world_size})).seconds("all_gather", GIGABYTE)

    assert seconds(1) == 0.0
    assert seconds(4) == pytest.approx(GIGABYTE * 3 / 4 / 400e9)
    assert seconds(8) == pytest.approx(GIGABYTE * 7 / 8 / 400e9)
    # Two nodes: half of the bytes enter a node through 8 links of 50e9 each; inside, 15/16 of them move at 400e9.
    assert seconds(16) == pytest.approx(GIGABYTE * 15 / 16 / 400e9)
    slow = ClusterConfig(**{**vars(cluster), "emulate": 64, "network_bandwidth": 10e9})
    assert Network(slow).seconds("all_gather", GIGABYTE) == pytest.approx(GIGABYTE * 7 / 8 / 80e9)


def test_efficiency_divides_the_bandwidth_of_nodes_but_not_the_latency():
    cluster = ClusterConfig(emulate=16, latency=1e-3, efficiency=EfficiencyConfig(reduce_scatter=0.5))
    plain = ClusterConfig(emulate=16, latency=1e-3)
    transfer = Network(plain).seconds("reduce_scatter", GIGABYTE) - 1e-3
    assert Network(cluster).seconds("reduce_scatter", GIGABYTE) == pytest.approx(1e-3 + 2 * transfer)
    assert Network(cluster).seconds("all_gather", GIGABYTE) == pytest.approx(1e-3 + transfer)

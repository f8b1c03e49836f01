"""The settings of an emulated cluster: ranks, bandwidths and latency.

Tests: tests/unit/config/test_reader.py.
"""

from dataclasses import dataclass, field

from megamtp.config.fields import Section, option


@dataclass(frozen=True)
class EfficiencyConfig(Section):
    """Share of the bandwidth that each collective reaches; above 1 if the bandwidth was measured with a slower one."""

    all_gather: float = option(1.0, "share of the bandwidth that all_gather reaches", at_least=1e-6, at_most=2)
    reduce_scatter: float = option(1.0, "share of the bandwidth that reduce_scatter reaches", at_least=1e-6, at_most=2)
    all_reduce: float = option(1.0, "share of the bandwidth that all_reduce reaches", at_least=1e-6, at_most=2)
    broadcast: float = option(1.0, "share of the bandwidth that broadcast reaches", at_least=1e-6, at_most=2)


@dataclass(frozen=True)
class ClusterConfig(Section):
    """A cluster emulated on one GPU, to see what a job would cost on it. Defaults: H100, NVLink, 400 Gb/s per GPU."""

    emulate: int | None = option(None, "ranks of the emulated cluster; null: no emulation", at_least=1, at_most=2**20)
    latency: float = option(20e-6, "seconds before a collective's first byte", at_least=0)
    flat_bandwidth: float | None = option(
        None, "bytes/s of a rank if all ranks are connected alike; null: use the next three settings", at_least=1
    )
    ranks_per_node: int = option(8, "ranks of a node", at_least=1)
    node_bandwidth: float = option(360e9, "bytes/s of each rank inside its node", at_least=1)
    network_bandwidth: float = option(50e9, "bytes/s of each rank to other nodes, all links at once", at_least=1)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    communication_sms: int = option(16, "multiprocessors that a collective occupies", at_least=1, at_most=2**10)

"""Predicts how long collectives take on a network of nodes."""

from megamtp.config import ClusterConfig

# How often each byte crosses a link. An all-reduce is a reduce-scatter and an all-gather.
PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "broadcast": 1, "barrier": 0}


class Network:
    """Predicts the time of a collective in which all ranks take part.

    A gather or reduction of S bytes moves S (W - 1) / W over the link of each of W ranks. An all-reduce moves twice as
    much. Between N nodes, whose links each carry an equal share, S (N - 1) / N enter each node. The slower of the two,
    inside a node or between nodes, determines the time.

    Source: Thakur, Rabenseifner, Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.
    """

    def __init__(self, cluster: ClusterConfig):
        assert cluster.emulate is not None
        self.cluster, self.world_size = cluster, cluster.emulate

    def seconds(self, kind: str, num_bytes: int) -> float:
        """Returns the seconds of a collective over `num_bytes` in total. `kind` is a key of PASSES."""
        cluster, world_size = self.cluster, self.world_size
        if world_size == 1:
            return 0.0
        moved_bytes = PASSES[kind] * num_bytes
        efficiency = getattr(cluster.efficiency, kind, 1.0)
        if cluster.flat_bandwidth:
            return cluster.latency + moved_bytes * (world_size - 1) / world_size / (cluster.flat_bandwidth * efficiency)
        ranks_per_node = min(world_size, cluster.ranks_per_node)
        num_nodes = -(-world_size // cluster.ranks_per_node)
        inside_node = moved_bytes * (world_size - 1) / world_size / cluster.node_bandwidth
        between_nodes = moved_bytes * (num_nodes - 1) / num_nodes / (ranks_per_node * cluster.network_bandwidth)
        return cluster.latency + max(inside_node, between_nodes) / efficiency

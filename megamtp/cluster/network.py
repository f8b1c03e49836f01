"""How long collectives take on a network of nodes."""

from megamtp.config import ClusterConfig

# of the bytes over a link
PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "broadcast": 1, "barrier": 0}


class Network:
    """How long a collective of all ranks takes.

    Of a tensor of S bytes, gathered or reduced, S (W - 1) / W cross each rank's link; an all-reduce is both. Between
    nodes, whose links all carry their part at once, S (N - 1) / N enter each of N nodes. The slower of the two decides.
    Source: Thakur, Rabenseifner, Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.
    """

    def __init__(self, cluster: ClusterConfig):
        assert cluster.emulate is not None
        self.cluster, self.world_size = cluster, cluster.emulate

    def seconds(self, kind: str, num_bytes: int) -> float:
        """Seconds of one collective over tensors of `num_bytes` in all."""
        cluster, world_size = self.cluster, self.world_size
        if world_size == 1:
            return 0.0
        moved = PASSES[kind] * num_bytes
        share = getattr(cluster.efficiency, kind, 1.0)
        if cluster.flat_bandwidth:
            return cluster.latency + moved * (world_size - 1) / world_size / (cluster.flat_bandwidth * share)
        ranks = min(world_size, cluster.ranks_per_node)
        nodes = -(-world_size // cluster.ranks_per_node)
        inside = moved * (world_size - 1) / world_size / cluster.node_bandwidth
        between = moved * (nodes - 1) / nodes / (ranks * cluster.network_bandwidth)
        return cluster.latency + max(inside, between) / share

"""Times of the transfers between pipeline stages."""

from dataclasses import dataclass

from megamtp.config import Config
from megamtp.model.cost import num_unembedding_parameters
from megamtp.planning.spread_schedule import TransferTimes


@dataclass(frozen=True)
class Link:
    """The connection between any two stages.

    Attributes:
        bandwidth: bytes per second.
        latency: seconds before the first byte arrives.
    """

    bandwidth: float
    latency: float

    def seconds(self, size_bytes: float, num_hops: int = 1) -> float:
        """Returns the time of a transfer that passes through `num_hops` links in small pieces."""
        return num_hops * self.latency + size_bytes / self.bandwidth

    def transfer_times(self, config: Config) -> TransferTimes:
        """Returns the times of one micro-batch's transfers.

        Broadcasts and sums run from stage to stage in a chain, in small pieces. Every slice sends its statistics to all
        other slices.
        """
        train, num_hops = config.train, config.engine.pipeline_stages - 1
        positions = train.micro_batch_size * train.sequence_length
        hidden_bytes = positions * config.model.dim * (4 if train.dtype == "fp32" else 2)
        return TransferTimes(
            self.seconds(hidden_bytes),
            self.seconds(hidden_bytes, num_hops),
            self.seconds(12 * positions * num_hops, num_hops),
        )

    def unembedding_reduction(self, config: Config, num_copies: int) -> float:
        """Returns the time of summing the fp32 gradients of all copies of a shared unembedding, once per step."""
        if config.model.unembedding == "replicated":  # each head's is on one stage
            return 0.0
        size_bytes = 4 * num_unembedding_parameters(config.model)
        return 2 * self.seconds(size_bytes * (num_copies - 1) / num_copies, num_copies - 1) if num_copies > 1 else 0.0


# For plans without measured times, in FLOPs instead of seconds: 50 GB/s and 20 us, while an H100 does 600 TFLOP/s.
NOMINAL_LINK = Link(bandwidth=50e9 / 600e12, latency=20e-6 * 600e12)

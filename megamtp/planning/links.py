"""How long what stages send each other is under way."""

from dataclasses import dataclass

from megamtp.config import Config
from megamtp.model.cost import unembedding_parameters
from megamtp.planning.spread_schedule import Exchange


@dataclass(frozen=True)
class Link:
    """Between any two stages: bytes per second, and seconds before the first byte."""

    bandwidth: float
    latency: float

    def seconds(self, size: float, hops: int = 1) -> float:
        return hops * self.latency + size / self.bandwidth

    def exchange(self, config: Config) -> Exchange:
        """Broadcasts and sums go from stage to stage in a chain, piece by piece; each slice's statistics to all
        others.
        """
        train, hops = config.train, config.engine.pipeline_stages - 1
        positions = train.micro_batch_size * train.sequence_length
        hidden = positions * config.model.dim * (4 if train.precision == "fp32" else 2)
        return Exchange(self.seconds(hidden), self.seconds(hidden, hops), self.seconds(12 * positions * hops, hops))

    def tied(self, config: Config, num_copies: int) -> float:
        """Summing the fp32 gradients of all copies of the unembedding, once a step."""
        size = 4 * unembedding_parameters(config.model)
        return 2 * self.seconds(size * (num_copies - 1) / num_copies, num_copies - 1) if num_copies > 1 else 0.0


# In FLOPs for seconds, where nothing was measured: 50 GB/s, and meanwhile an H100's 600 TFLOP/s.
NOMINAL = Link(bandwidth=50e9 / 600e12, latency=20e-6 * 600e12)

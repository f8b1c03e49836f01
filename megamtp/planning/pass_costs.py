"""What the parts of a stage's passes cost for one micro-batch: what the partition weighs. In FLOPs, or in seconds
once measured.
"""

from dataclasses import dataclass

from megamtp.config import Config
from megamtp.model.cost import head_cost, layer_cost, unembedding_flops
from megamtp.planning.stage_memory import StageContents


@dataclass(frozen=True)
class PassCosts:
    """All in one unit.

    Attributes:
        layer_forward, layer_backward: a trunk layer, recomputation apart.
        head_forward, head_backward: each head, by index, without its loss.
        loss: a head's unembedding and cross-entropy, forward and backward.
        copy: what a stage with heads pays once for its copy of the unembedding, such as adding its gradient to the sum.
        embedding: lookup and gradient, of the first stage.
        slice_statistics: per row of the unembedding, of a loss spread by vocabulary: logits, and what the slices
            exchange.
        slice_gradients: the same, with that known: the gradients of the hidden states and of the slice.
    """

    layer_forward: float
    layer_backward: float
    head_forward: tuple[float, ...]
    head_backward: tuple[float, ...]
    loss: float
    copy: float
    embedding: float
    slice_statistics: float
    slice_gradients: float

    def trunk_forward(self, contents: StageContents) -> float:
        """Of a stage's embedding and trunk layers."""
        return contents.num_trunk * self.layer_forward + contents.has_embedding * self.embedding / 2

    def trunk_backward(self, contents: StageContents, recompute: bool) -> float:
        """Of a stage's embedding and trunk layers."""
        layer = self.layer_backward + (self.layer_forward if recompute else 0)
        return contents.num_trunk * layer + contents.has_embedding * self.embedding / 2

    def heads_forward(self, heads: range) -> float:
        """Without losses."""
        return sum(self.head_forward[index] for index in heads)

    def heads_backward(self, heads: range) -> float:
        """Without losses."""
        return sum(self.head_backward[index] for index in heads)

    def heads_and_losses(self, heads: range) -> float:
        """Both passes of heads whose losses are not spread."""
        passes = self.heads_forward(heads) + self.heads_backward(heads)
        return passes + len(heads) * self.loss + bool(heads) * self.copy


def flop_costs(config: Config) -> PassCosts:
    """FLOPs: no lookup, no addition, no transfer. A product with the slice makes logits, two make gradients."""
    model, train = config.model, config.train
    positions = train.micro_batch_size * train.sequence_length
    layer = positions * layer_cost(model, train.sequence_length).flops
    heads = [
        positions * head_cost(model, index, train.sequence_length).flops for index in range(model.num_future_tokens)
    ]
    product = positions * 2 * model.dim
    return PassCosts(
        layer_forward=layer,
        layer_backward=2 * layer,
        head_forward=tuple(heads),
        head_backward=tuple(2 * head for head in heads),
        loss=3 * positions * unembedding_flops(model),
        copy=0,
        embedding=0,
        slice_statistics=product,
        slice_gradients=2 * product,
    )

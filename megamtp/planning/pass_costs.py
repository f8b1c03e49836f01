"""Costs of the parts of a stage's passes, for one micro-batch: FLOPs, or seconds where they were measured."""

from dataclasses import dataclass

from megamtp.config import Config
from megamtp.model.cost import head_cost, layer_cost, unembedding_flops
from megamtp.planning.stage_memory import StageContents


@dataclass(frozen=True)
class PassCosts:
    """Costs for one micro-batch, all in the same unit.

    Attributes:
        layer_forward, layer_backward: one trunk layer, without recomputation.
        head_forward, head_backward: each head, by index, without its loss.
        loss: one head's unembedding and cross-entropy, forward and backward.
        unembedding_copy: paid once by a stage with heads for its copy of a shared unembedding, such as adding its
            gradient to the fp32 sum. If each head has its own, `loss` includes it.
        embedding: lookup and gradient, on the first stage.
        slice_statistics: per row of the unembedding, for a loss spread by vocabulary: the logits and their statistics.
        slice_gradients: per row, once all slices know the statistics: the gradients of the hidden states and of the
            slice.
    """

    layer_forward: float
    layer_backward: float
    head_forward: tuple[float, ...]
    head_backward: tuple[float, ...]
    loss: float
    unembedding_copy: float
    embedding: float
    slice_statistics: float
    slice_gradients: float

    def trunk_forward(self, contents: StageContents) -> float:
        """Returns the forward cost of a stage's embedding and trunk layers."""
        return contents.num_trunk_layers * self.layer_forward + contents.has_embedding * self.embedding / 2

    def trunk_backward(self, contents: StageContents, recompute: bool) -> float:
        """Returns the backward cost of a stage's embedding and trunk layers, with recomputation if asked for."""
        layer = self.layer_backward + (self.layer_forward if recompute else 0)
        return contents.num_trunk_layers * layer + contents.has_embedding * self.embedding / 2

    def heads_forward(self, heads: range) -> float:
        """Returns the forward cost of the heads, without their losses."""
        return sum(self.head_forward[index] for index in heads)

    def heads_backward(self, heads: range) -> float:
        """Returns the backward cost of the heads, without their losses."""
        return sum(self.head_backward[index] for index in heads)

    def losses(self, heads: range) -> float:
        """Returns the cost of the heads' losses, forward and backward, where losses are not spread."""
        return len(heads) * self.loss + bool(heads) * self.unembedding_copy


def flop_costs(config: Config) -> PassCosts:
    """Returns the costs in FLOPs. Lookups, additions and transfers count as zero.

    A slice needs one matrix product for its logits and two for its gradients.
    """
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
        unembedding_copy=0,
        embedding=0,
        slice_statistics=product,
        slice_gradients=2 * product,
    )

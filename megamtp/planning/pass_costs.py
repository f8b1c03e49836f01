"""What the parts of a stage's passes cost for one micro-batch: what the partition weighs. In FLOPs, or in seconds once measured."""

from dataclasses import dataclass

from megamtp.config import Config
from megamtp.model.cost import layer_flops, unembedding_flops


@dataclass(frozen=True)
class PassCosts:
    """All in one unit.

    Attributes:
        layer_forward, layer_backward: a layer, recomputation apart.
        loss: a head's unembedding and cross-entropy, forward and backward.
        copy: what a stage with heads pays once for its copy of the unembedding, such as adding its gradient to the sum.
        embedding: lookup and gradient, of the first stage.
        slice_statistics: per row of the unembedding, of a loss spread by vocabulary: logits, and what the slices exchange.
        slice_gradients: the same, with that known: the gradients of the hidden states and of the slice.
    """

    layer_forward: float
    layer_backward: float
    loss: float
    copy: float
    embedding: float
    slice_statistics: float
    slice_gradients: float

    def forward(self, num_trunk: int, num_heads: int, has_embedding: bool) -> float:
        """Of a stage whose heads do both passes when z passes."""
        head = self.layer_forward + self.layer_backward + self.loss
        return num_trunk * self.layer_forward + num_heads * head + bool(num_heads) * self.copy + has_embedding * self.embedding / 2

    def backward(self, num_trunk: int, has_embedding: bool, recompute: bool) -> float:
        layer = self.layer_backward + (self.layer_forward if recompute else 0)
        return num_trunk * layer + has_embedding * self.embedding / 2


def flop_costs(config: Config) -> PassCosts:
    """FLOPs: no lookup, no addition, no transfer. A product with the slice makes logits, two make gradients."""
    model, train = config.model, config.train
    positions = train.micro_batch_size * train.sequence_length
    layer, product = positions * layer_flops(model, train.sequence_length), positions * 2 * model.dim
    loss = 3 * positions * unembedding_flops(model)
    return PassCosts(layer, 2 * layer, loss, 0, 0, product, 2 * product)

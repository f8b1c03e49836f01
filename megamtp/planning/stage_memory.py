"""Bytes of one rank of a pipeline at its peak, by kind.

Weights in the model's dtype; gradients summed in fp32, whole; AdamW's three fp32 numbers per parameter sharded over the
pipelines (ZeRO-1); what the micro-batches between their forward and backward pass keep; and what comes and goes within
one pass, at its most.
"""

from dataclasses import dataclass

from megamtp.config import Config
from megamtp.losses.linear_cross_entropy import default_chunk_rows
from megamtp.model.cost import head_cost, head_parameters, layer_cost, layer_parameters
from megamtp.optimizers.kinds import optimizer_kind

OPTIMIZER = "optimizer"  # the kind that data parallelism divides


@dataclass(frozen=True)
class StageContents:
    """What a stage holds.

    Attributes:
        heads: indices, from 0.
        rows: of the unembedding: all in a stage whose heads have their losses there, a slice of them where losses are
            spread.
        spread: losses are spread by vocabulary, over all stages with rows.
    """

    num_trunk: int
    heads: range
    has_embedding: bool
    rows: int
    spread: bool = False

    @property
    def num_heads(self) -> int:
        return len(self.heads)


def stage_memory(config: Config, data_parallel_size: int, contents: StageContents, alive: int) -> dict[str, int]:
    """With `alive` micro-batches between their forward and their backward pass."""
    model, train = config.model, config.train
    width = 4 if train.precision == "fp32" else 2
    parameters = contents.num_trunk * layer_parameters(model)
    parameters += sum(head_parameters(model, index) for index in contents.heads)
    parameters += (contents.has_embedding * model.vocab_size + contents.rows) * model.dim + bool(
        contents.rows
    ) * model.dim
    kept = _kept(config, contents, width)
    return {
        "weights": width * parameters,
        "gradients": 4 * parameters,
        OPTIMIZER: optimizer_kind(config.optimizer).state_bytes() * parameters // data_parallel_size,
        "activations": alive * kept,
        "within a pass": max(
            _largest_pass(config, contents, width), _embedding_gradient(config, contents, width) - kept
        ),
    }


def chunk_bytes(config: Config, width: int) -> int:
    """The logits of a head that live at once, `width` bytes each."""
    tokens, vocabulary = config.train.micro_batch_size * config.train.sequence_length, config.model.vocab_size
    return (
        width
        * vocabulary
        * min(tokens, config.head_loss.chunk_rows or default_chunk_rows(vocabulary, bytes_per_logit=width))
    )


def _boundary(config: Config, width: int) -> int:
    return config.train.micro_batch_size * config.train.sequence_length * config.model.dim * width


def _saved_by_layer(config: Config, width: int) -> int:
    """What a trunk layer keeps of a micro-batch."""
    train = config.train
    elements = layer_cost(config.model, train.sequence_length).kept_elements
    return train.micro_batch_size * train.sequence_length * elements * width


def _saved_by_heads(config: Config, heads: range, width: int) -> list[int]:
    """What each head keeps of a micro-batch."""
    train = config.train
    elements = [head_cost(config.model, index, train.sequence_length).kept_elements for index in heads]
    return [train.micro_batch_size * train.sequence_length * kept * width for kept in elements]


def _kept(config: Config, contents: StageContents, width: int) -> int:
    """Of each micro-batch: what the stage receives and sends, its heads' dz, and what its layers keep for their
    backward pass.

    Heads whose losses are spread keep as the trunk does, and with them what they sent away; others are done with when z
    passes.
    """
    boundary = _boundary(config, width)
    trunk = contents.num_trunk * (boundary if config.train.activation_checkpointing else _saved_by_layer(config, width))
    if contents.spread:
        return (
            2 * boundary + trunk + sum(saved + 2 * boundary for saved in _saved_by_heads(config, contents.heads, width))
        )
    return (2 + bool(contents.num_heads)) * boundary + trunk


def _largest_pass(config: Config, contents: StageContents, width: int) -> int:
    """A layer's backward pass or a loss, whichever needs more beside what is kept."""
    model, train, boundary = config.model, config.train, _boundary(config, width)
    # The last of its gradients, a matrix of the MLP's; and two of x's.
    layer = width * model.hidden_dim * model.dim + 2 * boundary
    if train.activation_checkpointing and contents.num_trunk:
        layer += _saved_by_layer(config, width)
    if contents.spread:
        return max(layer, _slice_pass(config, contents, width))
    if not contents.num_heads:
        return layer
    vocabulary = model.vocab_size * model.dim
    rounding = (4 + width) * vocabulary  # the sum of dW in fp32, and as autograd gets it
    chunk = 4 * vocabulary + chunk_bytes(config, width)
    if config.head_loss.precision == "fp8":  # two copies of the weight, one of hidden and one of the chunk's gradient
        chunk += 2 * vocabulary + boundary // width + chunk_bytes(config, 1)
    # the sum, while a head that is not the last runs its layer backward
    waiting = 4 * vocabulary if contents.num_heads > 1 else 0
    # dz in fp32, the gradient of the running head's z, what its layer returned, that normed, and its gradient.
    saved = max(_saved_by_heads(config, contents.heads, width))
    head = 4 * boundary // width + 4 * boundary + saved + max(rounding, chunk, waiting + layer)
    return max(layer, head)


def _slice_pass(config: Config, contents: StageContents, width: int) -> int:
    """All heads' hidden states, their gradients, and this slice's logits, which wait for the other slices' statistics.

    And the slice's gradient: in fp32, and as autograd gets it.
    """
    if not contents.rows:
        return 0
    model, tokens = config.model, config.train.micro_batch_size * config.train.sequence_length
    losses = model.num_future_tokens * (2 * _boundary(config, width) + tokens * contents.rows * width)
    slices = contents.rows * model.dim
    if config.head_loss.precision == "fp8":  # copies of the slice, of all hidden states and of one head's gradient
        losses += 2 * slices + model.num_future_tokens * tokens * model.dim + (width + 1) * tokens * contents.rows
    return losses + (4 + width) * slices


def _embedding_gradient(config: Config, contents: StageContents, width: int) -> int:
    """In the model's dtype; by then the micro-batch has nothing else left."""
    return width * config.model.vocab_size * config.model.dim if contents.has_embedding else 0

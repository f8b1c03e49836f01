"""Peak memory of one pipeline rank in bytes, by kind.

Weights are in the model's dtype. Gradients are summed in fp32 and not sharded. The optimizer's state is sharded over
the pipelines (ZeRO-1). Activations are what the micro-batches in flight keep. "Within a pass" is the largest amount of
memory that a pass allocates and frees again.
"""

from dataclasses import dataclass

from megamtp.config import Config, ModelConfig
from megamtp.losses.linear_cross_entropy import default_chunk_rows
from megamtp.model.cost import (
    computes_in_float8,
    head_cost,
    kept_bytes,
    layer_cost,
    num_head_parameters,
    num_layer_parameters,
)
from megamtp.model.heads import head_class
from megamtp.optimizers.kinds import optimizer_kind

OPTIMIZER = "optimizer"  # the kind that data parallelism shards


@dataclass(frozen=True)
class StageContents:
    """The modules of a stage.

    Attributes:
        heads: indices, from 0.
        rows: number of rows of the unembedding: all rows in a stage that computes its heads' losses, a slice where
            losses are spread.
        spread: whether losses are spread by vocabulary over all stages with rows.
    """

    num_trunk_layers: int
    heads: range
    has_embedding: bool
    rows: int
    spread: bool = False

    @property
    def num_heads(self) -> int:
        """The number of heads."""
        return len(self.heads)

    def reads_tokens(self, model: ModelConfig) -> bool:
        """Returns whether a head reads tokens, for which the stage holds a copy of the embedding."""
        return head_class(model).reads_tokens and any(self.heads)


def stage_memory(
    config: Config, data_parallel_size: int, contents: StageContents, num_in_flight: int
) -> dict[str, int]:
    """Returns the bytes of one rank at its peak, by kind.

    Args:
        num_in_flight: micro-batches between their forward and their backward pass.
    """
    model, train = config.model, config.train
    dtype_bytes = 4 if train.dtype == "fp32" else 2
    parameters = contents.num_trunk_layers * num_layer_parameters(model)
    parameters += sum(num_head_parameters(model, index) for index in contents.heads)
    has_embedding = contents.has_embedding or contents.reads_tokens(model)
    parameters += has_embedding * model.vocab_size * model.dim
    parameters += num_unembeddings(model, contents) * (contents.rows + bool(contents.rows)) * model.dim
    saved = _saved_bytes(config, contents, dtype_bytes)
    return {
        "weights": dtype_bytes * parameters + num_float8_parameters(config, contents.num_trunk_layers, contents.heads),
        "gradients": 4 * parameters,
        OPTIMIZER: optimizer_kind(config.optimizer).state_bytes() * parameters // data_parallel_size,
        "activations": num_in_flight * saved,
        "within a pass": max(
            _largest_pass_bytes(config, contents, dtype_bytes),
            _embedding_gradient_bytes(config, contents, dtype_bytes) - saved,
        ),
    }


def num_unembeddings(model: ModelConfig, contents: StageContents) -> int:
    """Returns the number of unembeddings of which the stage has rows; at least 1."""
    if model.unembedding == "shared":
        return 1
    return model.num_future_tokens if contents.spread else max(1, contents.num_heads)


def num_float8_parameters(config: Config, num_trunk_layers: int, heads: range) -> int:
    """Returns the number of parameters of layers and heads that have a copy in fp8."""
    model, train = config.model, config.train
    in_float8 = computes_in_float8(layer_cost(model, train.sequence_length), train)
    parameters = num_trunk_layers * num_layer_parameters(model) if in_float8 else 0
    for index in heads:
        if computes_in_float8(head_cost(model, index, train.sequence_length), train):
            parameters += num_head_parameters(model, index)
    return parameters


def chunk_bytes(config: Config, logit_bytes: int) -> int:
    """Returns the bytes of one chunk of a head's logits. Only one chunk is in memory at a time."""
    tokens, vocabulary = config.train.micro_batch_size * config.train.sequence_length, config.model.vocab_size
    return (
        logit_bytes
        * vocabulary
        * min(tokens, config.head_loss.chunk_rows or default_chunk_rows(vocabulary, bytes_per_logit=logit_bytes))
    )


def _boundary_bytes(config: Config, dtype_bytes: int) -> int:
    """Returns the bytes of one activation [B, T, D], which stages send to each other."""
    return config.train.micro_batch_size * config.train.sequence_length * config.model.dim * dtype_bytes


def bytes_saved_by_layer(config: Config) -> int:
    """Returns the bytes that one trunk layer saves of a micro-batch for its backward pass."""
    train = config.train
    cost = layer_cost(config.model, train.sequence_length)
    return train.micro_batch_size * train.sequence_length * kept_bytes(cost, train)


def bytes_saved_by_heads(config: Config, heads: range) -> list[int]:
    """Returns the bytes that each head saves of a micro-batch for its backward pass."""
    train = config.train
    costs = [head_cost(config.model, index, train.sequence_length) for index in heads]
    return [train.micro_batch_size * train.sequence_length * kept_bytes(cost, train) for cost in costs]


def _saved_bytes(config: Config, contents: StageContents, dtype_bytes: int) -> int:
    """Returns the bytes that each micro-batch in flight keeps.

    These are the stage's input and output, its heads' dz, and what its layers save for their backward pass. Heads with
    spread losses, and heads that read each other, save as much as trunk layers do, and their outputs. Other heads have
    run their backward pass already. The losses of heads that read each other also keep the sums of dW, in fp32.
    """
    boundary = _boundary_bytes(config, dtype_bytes)
    layer = boundary if config.train.activation_checkpointing else bytes_saved_by_layer(config)
    trunk = contents.num_trunk_layers * layer
    if contents.spread or head_class(config.model).is_chain:
        heads = bytes_saved_by_heads(config, contents.heads)
        sums = 0 if contents.spread else 4 * num_unembeddings(config.model, contents) * contents.rows * config.model.dim
        return 2 * boundary + trunk + sum(saved + 2 * boundary for saved in heads) + sums
    return (2 + bool(contents.num_heads)) * boundary + trunk


def _largest_pass_bytes(config: Config, contents: StageContents, dtype_bytes: int) -> int:
    """Returns the bytes that a layer's backward pass or a loss allocates, whichever are more."""
    model, train, boundary = config.model, config.train, _boundary_bytes(config, dtype_bytes)
    # The layer's last weight gradient, a matrix of the MLP, and two gradients of x.
    layer = dtype_bytes * model.hidden_dim * model.dim + 2 * boundary
    if train.activation_checkpointing and contents.num_trunk_layers:
        layer += bytes_saved_by_layer(config)
    if contents.spread:
        return max(layer, _slice_pass_bytes(config, contents, dtype_bytes))
    if not contents.num_heads:
        return layer
    vocabulary = model.vocab_size * model.dim
    total = 0 if head_class(model).is_chain else 4 * vocabulary  # the sum of dW in fp32, or 0: _saved_bytes counts it
    rounding = total + dtype_bytes * vocabulary  # with its copy in the model's dtype for autograd
    chunk = total + chunk_bytes(config, dtype_bytes)
    if config.resolved_head_loss.precision == "fp8":
        # two fp8 copies of the weight, one of hidden, one of the chunk's gradient
        chunk += 2 * vocabulary + boundary // dtype_bytes + chunk_bytes(config, 1)
    # The sum of dW stays in memory while all heads except for the last run their layer's backward pass.
    waiting = total if contents.num_heads > 1 and model.unembedding == "shared" else 0
    # dz in fp32. For the running head: the gradient of its z, its layer's output, the normed output and its gradient.
    saved = max(bytes_saved_by_heads(config, contents.heads))
    head = 4 * boundary // dtype_bytes + 4 * boundary + saved + max(rounding, chunk, waiting + layer)
    return max(layer, head)


def _slice_pass_bytes(config: Config, contents: StageContents, dtype_bytes: int) -> int:
    """Returns the bytes of a pass over all heads' losses in this stage's slice.

    These are the hidden states of all heads, their gradients, the slice's logits, which are kept until the statistics
    of the other slices arrive, and the slice's gradients: in fp32, and one in the model's dtype for autograd.
    """
    if not contents.rows:
        return 0
    model, tokens = config.model, config.train.micro_batch_size * config.train.sequence_length
    losses = model.num_future_tokens * (2 * _boundary_bytes(config, dtype_bytes) + tokens * contents.rows * dtype_bytes)
    slice_elements, num_slices = contents.rows * model.dim, num_unembeddings(model, contents)
    if config.resolved_head_loss.precision == "fp8":
        # copies of the slices, of all hidden states and of one head's gradient
        losses += 2 * num_slices * slice_elements + model.num_future_tokens * tokens * model.dim
        losses += (dtype_bytes + 1) * tokens * contents.rows
    return losses + (4 * num_slices + dtype_bytes) * slice_elements


def _embedding_gradient_bytes(config: Config, contents: StageContents, dtype_bytes: int) -> int:
    """Returns the bytes of the embedding's gradient in the model's dtype.

    It is the last gradient of a micro-batch, whose other activations are freed by then.
    """
    has_embedding = contents.has_embedding or contents.reads_tokens(config.model)
    return dtype_bytes * config.model.vocab_size * config.model.dim if has_embedding else 0

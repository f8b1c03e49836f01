"""Bytes of one rank, by kind: on the GPU under ZeRO-3, on the host, and in a checkpoint.

stage_memory.py has the memory of a pipeline's ranks on the GPU.

Tests: tests/unit/planning/test_planner.py.
"""

from megamtp.config import Config
from megamtp.model.cost import (
    computes_in_float8,
    head_cost,
    layer_cost,
    num_head_parameters,
    num_layer_parameters,
    num_parameters,
)
from megamtp.model.heads import head_class
from megamtp.optimizers.kinds import optimizer_kind
from megamtp.planning.gpus import LAYER_RATES
from megamtp.planning.stage_memory import bytes_saved_by_heads, bytes_saved_by_layer, chunk_bytes, num_float8_parameters


def zero_memory(config: Config, world_size: int) -> dict[str, float]:
    """Returns the bytes of one rank's GPU at its peak under ZeRO-3, by kind."""
    model, tokens = config.model, num_tokens(config)
    share = num_parameters(model) / world_size
    heads, vocabulary = range(model.num_future_tokens), 2 * model.vocab_size * model.dim
    is_chain, is_shared = head_class(model).is_chain, model.unembedding == "shared"
    largest = 2 * max(num_layer_parameters(model), *(num_head_parameters(model, index) for index in heads))
    largest = largest if is_shared else max(largest, vocabulary)
    layer_bytes, head_bytes = gathered_bytes(config)
    # The heads' backward passes follow all losses if heads read each other.
    alive = sum if is_chain else max
    saved_by_layer, saved_by_head = bytes_saved_by_layer(config), alive(bytes_saved_by_heads(config, heads))
    boundaries = 2 * tokens * model.dim * model.num_trunk_layers
    chunk = chunk_bytes(config, logit_bytes=2)
    # dW in fp32 and in the dtype of the reduction, and a chunk of logits. In fp8 also two copies of the weight, one of
    # the hidden states, and one of the chunk's gradient.
    num_sums = len(heads) if is_chain and not is_shared else 1
    head_loss = (2 * num_sums + gradient_scale(config)) * vocabulary + chunk
    head_loss += vocabulary + tokens * model.dim + chunk // 2 if num_float8_heads(config) else 0
    in_layer = LAYER_RATES[config.train.precision].backward_bytes * tokens * model.hidden_dim
    num_gathered = 1 + config.engine.prefetch_modules
    # Of the modules from one head's unembedding on, every second is an unembedding.
    num_unembeddings = 1 if is_shared else min(len(heads), (num_gathered + 1) // 2)
    on_device, gathers = 0 if config.engine.offload_optimizer else 1, world_size > 1 or config.engine.offload_parameters
    return {
        "weights": 0 if config.engine.offload_parameters else _shard_bytes(config, share),
        "gradients": 4 * share * on_device,
        "optimizer": state_bytes(config) * share * on_device,
        "gathered weights": num_gathered * max(layer_bytes, *head_bytes) + (1 + num_unembeddings) * vocabulary
        if gathers
        else 0,
        "gradients in flight": gradient_scale(config) * largest,
        "activations": boundaries + max(saved_by_layer, saved_by_head)
        if config.train.activation_checkpointing
        else model.num_trunk_layers * saved_by_layer + saved_by_head,
        "backward pass of one layer": in_layer,
        "head loss": head_loss,
    }


def describe_heads(config: Config) -> str | None:
    """Returns a sentence about the activations of heads that read each other; None for other heads."""
    if not head_class(config.model).is_chain:
        return None
    saved = sum(bytes_saved_by_heads(config, range(config.model.num_future_tokens)))
    return (
        f"heads read each other, so the activations of all heads exist at the same time: {saved / 2**30:.2f} GiB for a "
        "micro-batch (in a pipeline, of the heads on a stage, for each micro-batch in flight)"
    )


def host_memory(config: Config, share: float) -> dict[str, float]:
    """Returns CPU bytes by kind. `share`: parameters whose optimizer state the rank keeps, on the GPU or the CPU."""
    engine = config.engine
    return {
        "copy for the checkpoint": state_bytes(config) * share,
        "offloaded gradients and optimizer": (4 + state_bytes(config)) * share * engine.offload_optimizer,
        "offloaded weights": _shard_bytes(config, share) * engine.offload_parameters,
    }


def gathered_bytes(config: Config) -> tuple[int, list[int]]:
    """Returns the bytes of the weights that ZeRO-3 gathers for (a trunk layer, each head)."""
    model, train = config.model, config.train
    heads = range(model.num_future_tokens)
    costs = [layer_cost(model, train.sequence_length)]
    costs += [head_cost(model, index, train.sequence_length) for index in heads]
    parameters = [num_layer_parameters(model), *(num_head_parameters(model, index) for index in heads)]
    layer, *by_head = (
        number * (1 if computes_in_float8(cost, train) else 2) for number, cost in zip(parameters, costs, strict=True)
    )
    return layer, by_head


def _shard_bytes(config: Config, share: float) -> float:
    """Returns the bytes of the weights of `share` parameters, and of the copies in fp8 that layers have of them."""
    model = config.model
    copied = num_float8_parameters(config, model.num_trunk_layers, range(model.num_future_tokens))
    return (2 + copied / num_parameters(model)) * share


def checkpoint_bytes(config: Config) -> int:
    return state_bytes(config) * num_parameters(config.model)


def state_bytes(config: Config) -> int:
    """Returns the bytes of one parameter's fp32 weight and optimizer state."""
    return optimizer_kind(config.optimizer).state_bytes()


def gradient_scale(config: Config) -> int:
    """Returns the bytes of a gradient in a reduction, divided by the bytes of its weight in 16 bits."""
    return 2 if config.engine.reduce_dtype == "fp32" else 1


def num_float8_heads(config: Config) -> int:
    return sum(config.resolved_head_loss.in_float8(index) for index in range(config.model.num_future_tokens))


def num_tokens(config: Config) -> int:
    """Returns the number of tokens of one micro-batch."""
    return config.train.micro_batch_size * config.train.sequence_length

"""Bytes of one rank, by kind: on the GPU under ZeRO-3, on the host, and in a checkpoint.

stage_memory.py has the memory of a pipeline's ranks on the GPU.

Tests: tests/unit/planning/test_planner.py.
"""

from megamtp.config import Config
from megamtp.model.cost import head_cost, layer_cost, num_head_parameters, num_layer_parameters, num_parameters
from megamtp.optimizers.kinds import optimizer_kind
from megamtp.planning.stage_memory import chunk_bytes


def zero_memory(config: Config, world_size: int) -> dict[str, float]:
    """Returns the bytes of one rank's GPU at its peak under ZeRO-3, by kind."""
    model, tokens = config.model, num_tokens(config)
    share = num_parameters(model) / world_size
    layer, vocabulary = 2 * num_layer_parameters(model), 2 * model.vocab_size * model.dim
    largest = max(layer, *(2 * num_head_parameters(model, index) for index in range(model.num_future_tokens)))
    saved_by_layer = 2 * tokens * layer_cost(model, config.train.sequence_length).kept_elements
    costs = [head_cost(model, index, config.train.sequence_length) for index in range(model.num_future_tokens)]
    saved_by_head = 2 * tokens * max(cost.kept_elements for cost in costs)
    boundaries = 2 * tokens * model.dim * model.num_trunk_layers
    chunk = chunk_bytes(config, logit_bytes=2)
    # dW in fp32 and in the dtype of the reduction, and a chunk of logits. In fp8 also two copies of the weight, one of
    # the hidden states, and one of the chunk's gradient.
    head_loss = (2 + gradient_scale(config)) * vocabulary + chunk
    head_loss += vocabulary + tokens * model.dim + chunk // 2 if num_float8_heads(config) else 0
    on_device, gathers = 0 if config.engine.offload_optimizer else 1, world_size > 1 or config.engine.offload_parameters
    return {
        "weights": 0 if config.engine.offload_parameters else 2 * share,
        "gradients": 4 * share * on_device,
        "optimizer": state_bytes(config) * share * on_device,
        "gathered weights": (1 + config.engine.prefetch_modules) * largest + 2 * vocabulary if gathers else 0,
        "gradients in flight": gradient_scale(config) * largest,
        "activations": boundaries + max(saved_by_layer, saved_by_head)
        if config.train.activation_checkpointing
        else model.num_trunk_layers * saved_by_layer + saved_by_head,
        "backward pass of one layer": 13 * tokens * model.hidden_dim,
        "head loss": head_loss,
    }


def host_memory(config: Config, share: float) -> dict[str, float]:
    """Returns CPU bytes by kind. `share`: parameters whose optimizer state the rank keeps, on the GPU or the CPU."""
    engine = config.engine
    return {
        "copy for the checkpoint": state_bytes(config) * share,
        "offloaded gradients and optimizer": (4 + state_bytes(config)) * share * engine.offload_optimizer,
        "offloaded weights": 2 * share * engine.offload_parameters,
    }


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

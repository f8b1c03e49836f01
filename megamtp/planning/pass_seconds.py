"""Seconds of passes on a GPU: of the parts of a pipeline's stages, and of a micro-batch under ZeRO-3.

Tests: tests/unit/planning/test_planner.py.
"""

import dataclasses

from megamtp.cluster.network import Network
from megamtp.config import Config
from megamtp.model.cost import (
    head_cost,
    layer_cost,
    num_head_parameters,
    num_layer_parameters,
    num_unembedding_parameters,
)
from megamtp.model.layers import LayerCost
from megamtp.planning.gpus import ELEMENT_BYTES, Gpu
from megamtp.planning.memory import gradient_scale, num_float8_heads, num_tokens
from megamtp.planning.pass_costs import PassCosts


def pass_seconds(config: Config, gpu: Gpu) -> PassCosts:
    """Returns costs in seconds."""
    model, n = config.model, config.model.num_future_tokens
    adding = 10 / gpu.memory_bandwidth  # bytes to add a gradient to its fp32 sum, read and written
    forward, product = _layer_seconds(config, gpu), 2 * num_tokens(config) * model.dim / gpu.matrix_flops
    heads = _head_seconds(config, gpu)
    saved = num_float8_heads(config) / n * (1 - 1 / gpu.float8_speedup)  # share of a product that fp8 heads save
    return PassCosts(
        layer_forward=forward,
        layer_backward=2 * forward + adding * num_layer_parameters(model),
        head_forward=tuple(heads),
        head_backward=tuple(2 * head + adding * num_head_parameters(model, index) for index, head in enumerate(heads)),
        loss=model.vocab_size * product * (3 - 2 * saved),
        unembedding_copy=adding * num_unembedding_parameters(model),
        embedding=adding * model.vocab_size * model.dim,
        slice_statistics=product * (1 - saved),
        slice_gradients=product * (2 - saved),
    )


def _layer_seconds(config: Config, gpu: Gpu) -> float:
    """Returns the time of one trunk layer's forward pass of one micro-batch."""
    return num_tokens(config) * _seconds_per_token(layer_cost(config.model, config.train.sequence_length), gpu)


def _head_seconds(config: Config, gpu: Gpu) -> list[float]:
    """Returns the time of each head's forward pass of one micro-batch, without its loss."""
    costs = [
        head_cost(config.model, index, config.train.sequence_length) for index in range(config.model.num_future_tokens)
    ]
    return [num_tokens(config) * _seconds_per_token(cost, gpu) for cost in costs]


def _seconds_per_token(cost: LayerCost, gpu: Gpu) -> float:
    return (
        cost.matrix_flops / gpu.matrix_flops
        + cost.attention_flops / gpu.attention_flops
        + cost.streamed_elements * ELEMENT_BYTES / 3 / gpu.memory_bandwidth
    )


def micro_batch_seconds(config: Config, world_size: int, gpu: Gpu) -> tuple[float, float]:
    """Returns the (compute, exposed communication) time of one micro-batch's forward and backward pass."""
    model = config.model
    forward, heads = _layer_seconds(config, gpu), _head_seconds(config, gpu)
    product = 2 * num_tokens(config) * model.vocab_size * model.dim / gpu.matrix_flops
    in_float8 = num_float8_heads(config)
    losses = 3 * product * model.num_future_tokens - 2 * product * in_float8 * (1 - 1 / gpu.float8_speedup)
    if in_float8:  # reads the weight to find its largest element, and to write two copies in 8 bits
        losses += 6 * model.vocab_size * model.dim / gpu.memory_bandwidth
    recomputation = model.num_trunk_layers * forward if config.train.activation_checkpointing else 0.0
    compute = 3 * (model.num_trunk_layers * forward + sum(heads)) + losses + recomputation

    network = Network(dataclasses.replace(config.cluster, emulate=world_size))
    layer, vocabulary = 2 * num_layer_parameters(model), 2 * model.vocab_size * model.dim
    sizes = [2 * num_head_parameters(model, index) for index in range(model.num_future_tokens)]
    scale = gradient_scale(config)
    gather, reduction = network.seconds("all_gather", layer), network.seconds("reduce_scatter", scale * layer)
    head_gathers = [network.seconds("all_gather", size) for size in sizes]
    head_reductions = [network.seconds("reduce_scatter", scale * size) for size in sizes]
    embedding = network.seconds("all_gather", vocabulary) + network.seconds("reduce_scatter", scale * vocabulary)
    # Nothing runs before the first gathers or after the last reductions, which are those of the embedding and a layer.
    at_ends = embedding + gather + reduction
    between_layers = (model.num_trunk_layers - 1) * max(0.0, gather - forward)
    between_layers += (model.num_trunk_layers - 1) * max(0.0, gather + reduction - 2 * forward)
    for head_gather, head_reduction, head in zip(head_gathers, head_reductions, heads, strict=True):
        between_layers += max(0.0, head_gather + head_reduction - 2 * head)
    transfers = (2 * gather + reduction) * model.num_trunk_layers + 2 * sum(head_gathers) + sum(head_reductions)
    slowed = compute * min(1.0, transfers / compute)  # time of computation while transfers occupy multiprocessors
    slowdown = slowed * config.cluster.communication_sms / gpu.multiprocessors if world_size > 1 else 0.0
    return compute, at_ends + between_layers + slowdown

"""Seconds of passes on a GPU: of the parts of a pipeline's stages, and of a micro-batch under ZeRO-3.

The GPU computes while the CPU launches what follows, so a pass takes the longer of the two times.

Tests: tests/unit/planning/test_planner.py.
"""

import dataclasses

from megamtp.cluster.network import Network
from megamtp.config import Config
from megamtp.model.cost import (
    computes_in_float8,
    head_cost,
    layer_cost,
    num_head_parameters,
    num_layer_parameters,
    num_unembedding_parameters,
)
from megamtp.model.layers import LayerCost
from megamtp.planning.gpus import HOOK_SECONDS, LAYER_RATES, LOSS_HOST_SECONDS, Gpu, LayerRates
from megamtp.planning.memory import gathered_bytes, gradient_scale, num_float8_heads, num_tokens
from megamtp.planning.pass_costs import PassCosts


def pass_seconds(config: Config, gpu: Gpu) -> PassCosts:
    """Returns the costs of a pipeline's passes in seconds."""
    model, n = config.model, config.model.num_future_tokens
    adding = 10 / gpu.memory_bandwidth  # bytes to add a gradient to its fp32 sum, read and written
    (layer_forward, layer_backward), *heads = (_both_passes(config, cost, gpu) for cost in _costs(config))
    product = 2 * num_tokens(config) * model.dim / gpu.matrix_flops
    saved = num_float8_heads(config) / n * (1 - 1 / gpu.float8_speedup)  # share of a product that fp8 heads save
    unembedding, is_shared = adding * num_unembedding_parameters(model), model.unembedding == "shared"
    return PassCosts(
        layer_forward=layer_forward,
        layer_backward=layer_backward + adding * num_layer_parameters(model),
        head_forward=tuple(forward for forward, _ in heads),
        head_backward=tuple(
            backward + adding * num_head_parameters(model, index) for index, (_, backward) in enumerate(heads)
        ),
        loss=max(LOSS_HOST_SECONDS, model.vocab_size * product * (3 - 2 * saved)) + unembedding * (not is_shared),
        unembedding_copy=unembedding * is_shared,
        embedding=adding * model.vocab_size * model.dim,
        slice_statistics=product * (1 - saved),
        slice_gradients=product * (2 - saved),
    )


def _costs(config: Config) -> list[LayerCost]:
    """Returns the costs of a trunk layer and of each head."""
    model, length = config.model, config.train.sequence_length
    return [layer_cost(model, length), *(head_cost(model, index, length) for index in range(model.num_future_tokens))]


def _rates(config: Config, cost: LayerCost) -> LayerRates:
    return LAYER_RATES["fp8" if computes_in_float8(cost, config.train) else "bf16"]


def _both_passes(config: Config, cost: LayerCost, gpu: Gpu, hook_seconds: float = 0.0) -> tuple[float, float]:
    """Returns the times of a layer's or a head's (forward, backward) pass of one micro-batch, without a loss.

    Args:
        hook_seconds: time of the CPU for a pass besides launching the layer.
    """
    forward, host = _forward_on_gpu(config, cost, gpu), _rates(config, cost).host_seconds + hook_seconds
    return max(forward, host), max(2 * forward, host)


def _forward_on_gpu(config: Config, cost: LayerCost, gpu: Gpu) -> float:
    """Returns the GPU's time of a layer's or a head's forward pass of one micro-batch: a third of both passes."""
    rates = _rates(config, cost)
    per_token = cost.matrix_flops / (rates.product_speedup * gpu.matrix_flops)
    per_token += cost.attention_flops / gpu.attention_flops
    per_token += cost.streamed_elements * rates.element_bytes / 3 / gpu.memory_bandwidth
    num_weights = cost.matrix_flops / 2
    return num_tokens(config) * per_token + num_weights * rates.weight_bytes / 3 / gpu.memory_bandwidth


def micro_batch_seconds(config: Config, world_size: int, gpu: Gpu) -> tuple[float, float]:
    """Returns the (compute, exposed communication) time of one micro-batch's forward and backward pass."""
    compute = max(_seconds_on_gpu(config, gpu), _seconds_on_host(config))
    return compute, _exposed_seconds(config, world_size, gpu, compute)


def _seconds_on_gpu(config: Config, gpu: Gpu) -> float:
    model = config.model
    forward, *heads = (_forward_on_gpu(config, cost, gpu) for cost in _costs(config))
    product = 2 * num_tokens(config) * model.vocab_size * model.dim / gpu.matrix_flops
    in_float8 = num_float8_heads(config)
    losses = 3 * product * model.num_future_tokens - 2 * product * in_float8 * (1 - 1 / gpu.float8_speedup)
    if in_float8:  # reads each weight to find its largest element, and to write two copies in 8 bits
        num_weights = 1 if model.unembedding == "shared" else in_float8
        losses += num_weights * 6 * model.vocab_size * model.dim / gpu.memory_bandwidth
    recomputation = model.num_trunk_layers * forward if config.train.activation_checkpointing else 0.0
    return 3 * (model.num_trunk_layers * forward + sum(heads)) + losses + recomputation


def _seconds_on_host(config: Config) -> float:
    num_trunk_layers = config.model.num_trunk_layers
    layer, *heads = (_rates(config, cost).host_seconds for cost in _costs(config))
    recomputation = num_trunk_layers * layer if config.train.activation_checkpointing else 0.0
    passes = 2 * (num_trunk_layers * (layer + HOOK_SECONDS) + sum(heads) + len(heads) * HOOK_SECONDS)
    return passes + recomputation + len(heads) * LOSS_HOST_SECONDS


def _exposed_seconds(config: Config, world_size: int, gpu: Gpu, compute: float) -> float:
    model, scale = config.model, gradient_scale(config)
    network = Network(dataclasses.replace(config.cluster, emulate=world_size))
    (forward, backward), *heads = (_both_passes(config, cost, gpu, HOOK_SECONDS) for cost in _costs(config))
    layer_bytes, head_bytes = gathered_bytes(config)
    gather = network.seconds("all_gather", layer_bytes)
    reduction = network.seconds("reduce_scatter", 2 * scale * num_layer_parameters(model))
    head_gathers = [network.seconds("all_gather", size) for size in head_bytes]
    head_reductions = [
        network.seconds("reduce_scatter", 2 * scale * num_head_parameters(model, index)) for index in range(len(heads))
    ]
    vocabulary, hiding = 2 * model.vocab_size * model.dim, [head_backward for _, head_backward in heads]
    if model.unembedding == "replicated":  # gathered and reduced with each head, while its loss is computed
        loss = 3 * num_tokens(config) * vocabulary / gpu.matrix_flops
        for index in range(len(heads)):
            head_gathers[index] += network.seconds("all_gather", vocabulary)
            head_reductions[index] += network.seconds("reduce_scatter", scale * vocabulary)
            hiding[index] += loss
    embedding = network.seconds("all_gather", vocabulary) + network.seconds("reduce_scatter", scale * vocabulary)
    # Nothing runs before the first gathers or after the last reductions, which are those of the embedding and a layer.
    at_ends = embedding + gather + reduction
    between_layers = (model.num_trunk_layers - 1) * max(0.0, gather - forward)
    between_layers += (model.num_trunk_layers - 1) * max(0.0, gather + reduction - backward)
    for head_gather, head_reduction, computation in zip(head_gathers, head_reductions, hiding, strict=True):
        between_layers += max(0.0, head_gather + head_reduction - computation)
    transfers = (2 * gather + reduction) * model.num_trunk_layers + 2 * sum(head_gathers) + sum(head_reductions)
    slowed = min(compute, transfers)  # time of computation while transfers occupy multiprocessors
    slowdown = slowed * config.cluster.communication_sms / gpu.multiprocessors if world_size > 1 else 0.0
    return at_ends + between_layers + slowdown

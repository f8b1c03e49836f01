"""The cost of a model: parameters, floating-point operations and saved activations, as its modules report them.

Used for model FLOPs utilisation, for planning, and for cutting the layers into pipeline stages.

Source: Gloeckle et al. 2024, arXiv:2404.19737, table S5. The floating-point operations per token are
F(n) = 3 [L (2 P_layer + 2 T D) + n 2 V D], where L counts trunk layers and heads, and P_layer is the number of weights
in the matrices of a layer. Causal attention counts half of full attention; norms, the embedding lookup and
recomputation do not count.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from megamtp.config import ModelConfig, TrainConfig
from megamtp.model.layers import LayerCost
from megamtp.model.mtp import MTPModel

# Peak FLOP/s of dense matrix products by (words of the device's name, precision). The first entry that matches a
# device counts. Source: NVIDIA data sheets.
PEAK_FLOPS = {
    ("H200", "bf16"): 989.4e12,
    ("H100 PCIe", "bf16"): 756e12,
    ("H100", "bf16"): 989.4e12,
    ("A100", "bf16"): 312e12,
    ("H200", "fp32"): 67e12,
    ("H100 PCIe", "fp32"): 51e12,
    ("H100", "fp32"): 67e12,
    ("A100", "fp32"): 19.5e12,
}


@lru_cache
def meta_model(model: ModelConfig) -> MTPModel:
    """Returns the model on torch's meta device: shapes without memory.

    Raises:
        InputError: `model.head_kind` cannot be resolved; see find_kind.
    """
    with torch.device("meta"):
        return MTPModel(model)


@lru_cache
def layer_cost(model: ModelConfig, sequence_length: int) -> LayerCost:
    """Returns the cost of one position in one trunk layer."""
    return meta_model(model).trunk[0].cost(sequence_length)


@lru_cache
def head_cost(model: ModelConfig, index: int, sequence_length: int) -> LayerCost:
    """Returns the cost of one position in the head at `index` (from 0), without the projection to the vocabulary."""
    return meta_model(model).head(index).cost(sequence_length)


def computes_in_float8(cost: LayerCost, train: TrainConfig) -> bool:
    """Returns whether the layer or head with this cost computes its products in fp8."""
    return train.precision == "fp8" and cost.float8_kept_bytes is not None


def kept_bytes(cost: LayerCost, train: TrainConfig) -> int:
    """Returns the bytes that the layer or head with this cost saves at one position for its backward pass."""
    if computes_in_float8(cost, train):
        assert cost.float8_kept_bytes is not None
        return cost.float8_kept_bytes
    return cost.kept_elements * (4 if train.dtype == "fp32" else 2)


@lru_cache
def num_layer_parameters(model: ModelConfig) -> int:
    """Returns the number of parameters of one trunk layer, with its two norms."""
    return _num_module_parameters(meta_model(model).trunk[0])


@lru_cache
def num_head_parameters(model: ModelConfig, index: int) -> int:
    """Returns the number of parameters of the head at `index` (from 0); 0 if an earlier head has the same module."""
    is_first_use = meta_model(model).head_class.module_index(model, index) == index
    return _num_module_parameters(meta_model(model).head(index)) if is_first_use else 0


@lru_cache
def num_parameters(model: ModelConfig) -> int:
    """Returns the number of parameters of the whole model: embedding, trunk, heads and unembeddings."""
    return _num_module_parameters(meta_model(model))


@lru_cache
def num_unembedding_parameters(model: ModelConfig) -> int:
    """Returns the number of parameters of one unembedding, with the final norm."""
    return _num_module_parameters(meta_model(model).unembedding_of(0))


def describe_trunk(model: ModelConfig) -> str | None:
    """Returns a sentence that compares the model with that of one head; None if both have equally many parameters."""
    single = replace(
        model, num_future_tokens=1, head_kind="parallel", first_head="same", chain_form="deepseek", chain_weights=None
    )
    size, single_size = num_parameters(model), num_parameters(single)
    if size == single_size:
        return None
    return (
        f"{model.num_trunk_layers} trunk layers and {model.num_future_tokens} heads have {size:,} parameters, "
        f"{size / single_size - 1:+.2%} compared with {single.num_trunk_layers} trunk layers and one head"
    )


def unembedding_flops(model: ModelConfig) -> int:
    """Returns the floating-point operations of one position's projection to the vocabulary, forward only."""
    return 2 * model.vocab_size * model.dim


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Returns the floating-point operations of one position's forward and backward pass, for all heads."""
    trunk = model.num_trunk_layers * layer_cost(model, sequence_length).flops
    heads = sum(head_cost(model, index, sequence_length).flops for index in range(model.num_future_tokens))
    return 3 * (trunk + heads + model.num_future_tokens * unembedding_flops(model))


def _num_module_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def peak_flops(device_name: str, precision: str) -> float | None:
    """Returns the peak FLOP/s of a device in "bf16", "fp16" or "fp32"; None if PEAK_FLOPS does not list it."""
    precision = "bf16" if precision == "fp16" else precision
    for (name, known_precision), flops in PEAK_FLOPS.items():
        if precision == known_precision and all(word in device_name for word in name.split()):
            return flops
    return None

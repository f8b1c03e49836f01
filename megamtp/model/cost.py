"""What a model costs: parameters, floating-point operations, kept activations. Its modules say so themselves.

Used for the model-FLOP share, for planning and for cutting the layers into pipeline stages.

Source: paper.md, table S5 (F(n) = 3 [L (2 P_layer + 2 T d) + n 2 V d]: causal attention counted at half, norms and the
embedding's lookup not at all, recomputation not at all).
"""

from functools import lru_cache

import torch
from torch import nn

from megamtp.config import ModelConfig
from megamtp.model.layers import LayerCost
from megamtp.model.mtp import MTPModel

# Dense matrix-product peaks by (part of the device's name, precision), in FLOP/s, without sparsity. Source: NVIDIA data
# sheets.
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
def whole_model(model: ModelConfig) -> MTPModel:
    """The model on torch's meta device: shapes without memory. Raises InputError: its head kind is not known."""
    with torch.device("meta"):
        return MTPModel(model)


@lru_cache
def layer_cost(model: ModelConfig, sequence_length: int) -> LayerCost:
    """Of one position in one trunk layer."""
    return whole_model(model).trunk[0].cost(sequence_length)


@lru_cache
def head_cost(model: ModelConfig, index: int, sequence_length: int) -> LayerCost:
    """Of one position in the head at `index` (from 0), without its projection to the vocabulary."""
    return whole_model(model).heads[index].cost(sequence_length)


@lru_cache
def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one trunk layer, its two norms included."""
    return _count(whole_model(model).trunk[0])


@lru_cache
def head_parameters(model: ModelConfig, index: int) -> int:
    """Parameters of the head at `index` (from 0)."""
    return _count(whole_model(model).heads[index])


@lru_cache
def parameters(model: ModelConfig) -> int:
    """Parameters of the whole model: embedding, trunk, heads, norm and unembedding."""
    return _count(whole_model(model))


@lru_cache
def unembedding_parameters(model: ModelConfig) -> int:
    """Parameters of the unembedding, the final norm included."""
    return _count(whole_model(model).unembedding)


def unembedding_flops(model: ModelConfig) -> int:
    """Floating-point operations of one projection to the vocabulary, forward only, for one position."""
    return 2 * model.vocab_size * model.dim


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one position of a window of `sequence_length`."""
    trunk = model.num_trunk_layers * layer_cost(model, sequence_length).flops
    heads = sum(head_cost(model, index, sequence_length).flops for index in range(model.num_future_tokens))
    return 3 * (trunk + heads + model.num_future_tokens * unembedding_flops(model))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a known card at a precision ("bf16", "fp16", "fp32"); None where it is not known."""
    precision = "bf16" if precision == "fp16" else precision
    for (name, known_precision), flops in PEAK_FLOPS.items():
        if precision == known_precision and all(word in device_name for word in name.split()):
            return flops
    return None

"""The cost of a model: numbers of parameters, and floating-point operations computed by hand."""

import dataclasses

import pytest

from megamtp.model.cost import (
    computes_in_float8,
    flops_per_token,
    kept_bytes,
    layer_cost,
    num_layer_parameters,
    num_parameters,
    num_unembedding_parameters,
    peak_flops,
)
from megamtp.model.layers import LayerCost
from megamtp.model.mtp import MTPModel
from tests.cases import small_config
from tests.models import model_config


@pytest.mark.parametrize(
    "config", [model_config(), model_config(num_key_value_heads=2), model_config(num_future_tokens=1, mlp_dim=40)]
)
def test_cost_counts_all_parameters(config):
    model = MTPModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(config)
    assert sum(parameter.numel() for parameter in model.heads[0].parameters()) == num_layer_parameters(config)
    assert len(model.trunk) + len(model.heads) == config.num_layers


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("an unknown device", "bf16", None),
    ],
)
def test_peak_flops_of_known_and_unknown_devices(device, precision, expected):
    assert peak_flops(device, precision) == expected


def test_flops_are_three_times_those_of_the_forward_products():
    config = model_config(mlp_dim=48)
    # attention has 4 * 32 * 32 weights, the MLP 3 * 32 * 48; causal attention itself takes 2 T d operations
    layer = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 2 * 10 * 32
    assert layer_cost(config, 10).flops == layer
    assert flops_per_token(config, 10) == 3 * (5 * layer + 2 * (2 * 50 * 32))


def test_bytes_that_a_layer_saves_in_each_precision():
    config = model_config(num_key_value_heads=2, mlp_dim=48)
    cost, own = layer_cost(config, 10), LayerCost(1, 1, kept_elements=5, streamed_elements=1)
    key_value_dim = config.key_value_heads * config.head_dim
    elements = 6 * 32 + 2 * key_value_dim + 3 * 48
    # x and h, rotated queries and keys, attended values in 16 bits; attended values and both norms' outputs also in 8;
    # the product that holds queries, keys and values, because the values are a view of it
    fp8 = 2 * (4 * 32 + key_value_dim + 2 * 48) + 3 * 32 + 48 + 2 * (32 + 2 * key_value_dim)
    rows = ("fp32", 4 * elements, 20), ("bf16", 2 * elements, 10), ("fp8", fp8, 10)
    for precision, expected, expected_of_own in rows:
        train = dataclasses.replace(small_config().train, precision=precision)
        assert (kept_bytes(cost, train), kept_bytes(own, train)) == (expected, expected_of_own)
        assert (computes_in_float8(cost, train), computes_in_float8(own, train)) == (precision == "fp8", False)


def test_the_unembedding_counts_the_final_norm():
    assert num_unembedding_parameters(model_config()) == 50 * 32 + 32

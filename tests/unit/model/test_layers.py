"""One layer: norm and rotary embedding against their formulas, grouped queries against full attention."""

import math

import pytest
import torch

from megamtp.model.layers import TransformerLayer, rms_norm
from megamtp.model.rotary import rotary_tables, rotate
from tests.models import model_config


@pytest.mark.parametrize("magnitude", [1.0, 1e-3])  # with 1e-3, epsilon dominates the mean square
def test_rms_norm_follows_its_formula(magnitude):
    weight, x, eps = torch.randn(16, dtype=torch.float64), magnitude * torch.randn(3, 16, dtype=torch.float64), 1e-5
    expected = torch.empty_like(x)
    for row in range(3):
        mean_square = sum(float(element) ** 2 for element in x[row]) / 16
        for column in range(16):
            expected[row, column] = x[row, column] * weight[column] / math.sqrt(mean_square + eps)
    torch.testing.assert_close(rms_norm(x, weight, eps), expected, rtol=1e-12, atol=0)


def test_rotary_scores_depend_only_on_the_distance():
    cos, sin = rotary_tables(20, 8, 10000.0, torch.device("cpu"), torch.float64)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for position in (0, 7, 16):
        rotated_query = rotate(query, cos[position : position + 1], sin[position : position + 1])
        rotated_key = rotate(key, cos[position + 3 : position + 4], sin[position + 3 : position + 4])
        scores.append((rotated_query * rotated_key).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-6, atol=1e-7)


def test_grouped_queries_equal_repeated_key_value_heads():
    grouped = TransformerLayer(model_config(num_key_value_heads=2)).double()
    full = TransformerLayer(model_config()).double()
    weights = grouped.state_dict()
    for name in ("attention.key.weight", "attention.value.weight"):
        weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    for norm in ("attention_norm.weight", "mlp_norm.weight"):
        weights[norm] = torch.ones(32, dtype=torch.float64)
    full.load_state_dict(weights)
    grouped.load_state_dict({name: weight for name, weight in weights.items() if "norm" in name}, strict=False)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), full(x))

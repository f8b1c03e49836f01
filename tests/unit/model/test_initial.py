"""Initial weights: standard deviations, and dependence on seed and parameter name alone."""

import pytest
import torch

from megamtp.model.initial import initial_value
from tests.models import model_config


def test_initial_values_depend_only_on_seed_and_name():
    config = model_config()
    value = initial_value("trunk.0.attention.query.weight", (32, 32), config, 0)
    assert torch.equal(value, initial_value("trunk.0.attention.query.weight", (32, 32), config, 0))
    assert not torch.equal(value, initial_value("trunk.1.attention.query.weight", (32, 32), config, 0))
    assert not torch.equal(value, initial_value("trunk.0.attention.query.weight", (32, 32), config, 1))


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("embedding.weight", 0.02),
        ("trunk.0.mlp.up.weight", 0.02),
        ("heads.1.mlp.down.weight", 0.02 / 10**0.5),
        ("trunk.0.attention.output.weight", 0.02 / 10**0.5),
    ],
)
def test_initial_standard_deviations(name, deviation):
    assert initial_value(name, (400, 400), model_config(), 0).std().item() == pytest.approx(deviation, rel=0.02)


def test_norms_start_at_one():
    assert torch.equal(initial_value("unembedding.norm", (32,), model_config(), 0), torch.ones(32))

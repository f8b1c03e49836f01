"""Layers of the trunk against numbers written by hand: models with n heads have as many parameters as with one."""

import dataclasses

import pytest

from megamtp.config import ModelConfig
from megamtp.errors import InputError
from megamtp.model.cost import num_parameters

# Layers have 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16 = 1952 parameters, as many as an unembedding of 121 tokens
# with its norm: 16 * 122.
MODEL = ModelConfig(
    dim=16, num_layers=10, num_future_tokens=1, num_attention_heads=4, num_key_value_heads=2, mlp_dim=24, vocab_size=121
)


@pytest.mark.parametrize(
    ("num_heads", "vocab_size", "kind", "num_trunk_layers"),
    [
        (1, 121, "parallel", 9),
        (2, 121, "parallel", 7),
        (4, 121, "parallel", 3),  # three more heads and three more unembeddings
        (4, 30, "parallel", 5),  # three unembeddings have 3 * 16 * 31 parameters, 0.8 of a layer
        (4, 10, "parallel", 6),  # 0.3 of a layer
        (4, 121, "linear", 6),  # 4 * 256 + (3 - 1) * 1952 parameters more than one layer: 2.52 layers, rounded
    ],
)
def test_unembeddings_of_heads_count_as_parameters(num_heads, vocab_size, kind, num_trunk_layers):
    changes = {"num_future_tokens": num_heads, "vocab_size": vocab_size, "head_kind": kind}
    model = dataclasses.replace(MODEL, unembedding="replicated", **changes)
    assert model.num_trunk_layers == num_trunk_layers
    single = dataclasses.replace(MODEL, vocab_size=vocab_size)
    assert abs(num_parameters(model) - num_parameters(single)) <= 1952 / 2
    if vocab_size == 121 and kind == "parallel":
        assert num_parameters(model) == num_parameters(single)
    assert dataclasses.replace(model, match_parameters=False).num_trunk_layers == 9


def test_unembeddings_that_leave_no_trunk_are_named():
    model = dataclasses.replace(MODEL, num_future_tokens=4, num_layers=7)
    model.check("model")
    with pytest.raises(InputError, match=r"the trunk needs one; model\.unembedding=replicated takes layers from it"):
        dataclasses.replace(model, unembedding="replicated").check("model")

"""Defaults of OptimizerKind: bytes of the state, and the state before the first step."""

import torch

from megamtp.optimizers.adamw import AdamW
from megamtp.optimizers.base import OptimizerKind


class Sgd(OptimizerKind):
    """An optimizer without state tensors."""

    tensors = ()


def test_state_bytes_are_the_weight_and_each_tensor_in_fp32():
    assert Sgd.state_bytes() == 4
    assert AdamW.state_bytes() == 4 + 4 + 4


def test_prepare_fills_an_empty_state_with_zeros():
    weights, state = torch.ones(2, 3), {}
    AdamW.prepare(state, weights)
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"].item() == 0 and torch.equal(state["exp_avg"], torch.zeros(2, 3))
    assert torch.equal(state["exp_avg_sq"], torch.zeros(2, 3)) and not state["exp_avg"].requires_grad


def test_prepare_keeps_an_existing_state():
    state = {"step": torch.tensor(5.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    before = dict(state)
    AdamW.prepare(state, torch.zeros(2))
    assert state == before

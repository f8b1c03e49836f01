"""What every kind of optimizer has: the size of its state, and a state before the first step."""

import torch

from megamtp.optimizers.adamw import AdamW
from megamtp.optimizers.base import OptimizerKind


class Sgd(OptimizerKind):
    """Keeps nothing but its count of steps."""

    tensors = ()


def test_bytes_of_a_parameter():
    """Its weight and each tensor in fp32."""
    assert Sgd.state_bytes() == 4
    assert AdamW.state_bytes() == 4 + 4 + 4


def test_an_empty_state_is_that_before_the_first_step():
    weights, state = torch.ones(2, 3), {}
    AdamW.prepare(state, weights)
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"].item() == 0 and torch.equal(state["exp_avg"], torch.zeros(2, 3))
    assert torch.equal(state["exp_avg_sq"], torch.zeros(2, 3)) and not state["exp_avg"].requires_grad


def test_a_state_that_is_there_stays():
    state = {"step": torch.tensor(5.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    before = dict(state)
    AdamW.prepare(state, torch.zeros(2))
    assert state == before

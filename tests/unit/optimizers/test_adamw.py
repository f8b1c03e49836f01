"""AdamW: which parameters have weight decay, and a first step computed by hand."""

import pytest
import torch
from torch import nn

from megamtp.config import OptimizerConfig
from megamtp.optimizers.adamw import AdamW

SETTINGS = OptimizerConfig(lr=0.5, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)


def test_flat_shards_of_matrices_have_weight_decay():
    """Shards of ZeRO-3 have one dimension; the shape of the whole parameter counts."""
    parameters = {"matrix": nn.Parameter(torch.zeros(4)), "norm": nn.Parameter(torch.zeros(2))}
    optimizer = AdamW.make(SETTINGS, parameters, {"matrix": (4, 2), "norm": (4,)})
    groups = [([*group["params"]], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [([parameters["matrix"]], 0.1), ([parameters["norm"]], 0.0)]


def test_the_first_step_moves_by_the_learning_rate_and_decays_matrices():
    """With bias correction of both moments, the first update is lr * sign(gradient)."""
    parameters = {"matrix": nn.Parameter(torch.tensor([[2.0, -2.0]])), "norm": nn.Parameter(torch.tensor([2.0]))}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    optimizer = AdamW.make(SETTINGS, parameters, shapes)
    parameters["matrix"].grad, parameters["norm"].grad = torch.tensor([[3.0, -0.25]]), torch.tensor([4.0])
    optimizer.step()
    decayed = 2 * (1 - 0.5 * 0.1)
    assert parameters["matrix"].tolist() == [pytest.approx([decayed - 0.5, -decayed + 0.5])]
    assert parameters["norm"].tolist() == pytest.approx([2.0 - 0.5])
    state = optimizer.state[parameters["norm"]]
    assert [state[name].item() for name in AdamW.tensors] == pytest.approx([0.1 * 4, 0.01 * 16])

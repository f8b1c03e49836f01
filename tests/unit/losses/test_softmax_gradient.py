"""Softmax and the gradient of cross-entropy, by hand: logits (0, ln 3) are probabilities (1/4, 3/4)."""

import math

import pytest
import torch

from megamtp.losses.softmax_gradient import negative_log_likelihood_, softmax_gradient_
from megamtp.targets import IGNORED

TARGETS = torch.tensor([0, 1, IGNORED])
NLL = [math.log(4), math.log(4 / 3), 0.0]


def logits() -> torch.Tensor:
    """The second row has larger logits, and so a larger log-partition: 5 + ln 4."""
    return torch.tensor([[0.0, math.log(3)], [5.0, 5.0 + math.log(3)], [0.0, math.log(3)]], dtype=torch.float64)


def test_probabilities_take_the_place_of_the_logits():
    found = logits()
    nll, log_partition, valid = negative_log_likelihood_(found, TARGETS)
    assert nll.tolist() == pytest.approx(NLL)
    assert log_partition.tolist() == pytest.approx([math.log(4), 5 + math.log(4), math.log(4)])
    assert valid.tolist() == [True, True, False]
    assert found.flatten().tolist() == pytest.approx([1 / 4, 3 / 4] * 3)


def test_the_gradient_is_the_probability_without_that_of_the_target():
    found, copy = logits(), torch.empty(3, 2)
    nll, squared = softmax_gradient_(found, TARGETS, factor=2.0, z_loss=0.0, copy_CV=copy, copy_factor=16.0)
    assert nll.tolist() == pytest.approx(NLL)
    assert squared.tolist() == pytest.approx([math.log(4) ** 2, (5 + math.log(4)) ** 2, 0.0])
    expected = [-3 / 4, 3 / 4, 1 / 4, -1 / 4, 0.0, 0.0]
    assert found.flatten().tolist() == pytest.approx([2 * each for each in expected])
    assert copy.flatten().tolist() == pytest.approx([16 * each for each in expected])


def test_z_loss_adds_to_every_probability():
    """d(z * log_partition^2)/d logit is 2 z log_partition times the probability."""
    found = logits()
    softmax_gradient_(found, TARGETS, factor=1.0, z_loss=0.1)
    plus = [2 * 0.1 * math.log(4), 2 * 0.1 * (5 + math.log(4))]
    expected = [-3 / 4 + plus[0] / 4, 3 / 4 + plus[0] * 3 / 4, 1 / 4 + plus[1] / 4, -1 / 4 + plus[1] * 3 / 4]
    assert found.flatten().tolist() == pytest.approx([*expected, 0.0, 0.0])

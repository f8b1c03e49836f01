"""The gradient of cross-entropy computed by hand: logits (0, ln 3) give probabilities (1/4, 3/4)."""

import math

import pytest
import torch

from megamtp.losses.softmax_gradient import negative_log_likelihood_, softmax_gradient_
from megamtp.targets import IGNORED

TARGETS = torch.tensor([0, 1, IGNORED])
NLL = [math.log(4), math.log(4 / 3), 0.0]


def make_logits() -> torch.Tensor:
    """Returns three rows of logits; the second has the larger log-partition 5 + ln 4."""
    return torch.tensor([[0.0, math.log(3)], [5.0, 5.0 + math.log(3)], [0.0, math.log(3)]], dtype=torch.float64)


def test_probabilities_overwrite_the_logits():
    logits = make_logits()
    nll, log_partition, valid = negative_log_likelihood_(logits, TARGETS)
    assert nll.tolist() == pytest.approx(NLL)
    assert log_partition.tolist() == pytest.approx([math.log(4), 5 + math.log(4), math.log(4)])
    assert valid.tolist() == [True, True, False]
    assert logits.flatten().tolist() == pytest.approx([1 / 4, 3 / 4] * 3)


def test_the_gradient_is_softmax_minus_one_hot():
    logits, copy = make_logits(), torch.empty(3, 2)
    nll, squared = softmax_gradient_(logits, TARGETS, factor=2.0, z_loss=0.0, copy_CV=copy, copy_factor=16.0)
    assert nll.tolist() == pytest.approx(NLL)
    assert squared.tolist() == pytest.approx([math.log(4) ** 2, (5 + math.log(4)) ** 2, 0.0])
    expected = [-3 / 4, 3 / 4, 1 / 4, -1 / 4, 0.0, 0.0]
    assert logits.flatten().tolist() == pytest.approx([2 * gradient for gradient in expected])
    assert copy.flatten().tolist() == pytest.approx([16 * gradient for gradient in expected])


def test_z_loss_scales_every_probability():
    """d(z * log_partition^2)/d logit = 2 z log_partition * probability."""
    logits = make_logits()
    softmax_gradient_(logits, TARGETS, factor=1.0, z_loss=0.1)
    z_terms = [2 * 0.1 * math.log(4), 2 * 0.1 * (5 + math.log(4))]
    expected = [-3 / 4 + z_terms[0] / 4, 3 / 4 + z_terms[0] * 3 / 4]
    expected += [1 / 4 + z_terms[1] / 4, -1 / 4 + z_terms[1] * 3 / 4]
    assert logits.flatten().tolist() == pytest.approx([*expected, 0.0, 0.0])

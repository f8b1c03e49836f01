"""The learning rate schedule at points that can be computed by hand."""

import pytest

from megamtp.config import OptimizerConfig
from megamtp.optimizers.schedule import learning_rate

SETTINGS = OptimizerConfig(lr=2.0, warmup_steps=10, final_lr_ratio=0.1)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.2), (5, 1.0), (10, 2.0), (60, 1.1), (110, 0.2)])
def test_warm_up_then_cosine_decay(step, expected):
    assert learning_rate(step, 110, SETTINGS) == pytest.approx(expected)


def test_without_warm_up():
    assert learning_rate(1, 1, OptimizerConfig(lr=2.0, warmup_steps=0, final_lr_ratio=0.5)) == pytest.approx(1.0)

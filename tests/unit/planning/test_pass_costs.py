"""Costs of a stage's passes, by hand."""

import pytest

from megamtp.planning.pass_costs import PassCosts, flop_costs
from megamtp.planning.stage_memory import StageContents
from tests.cases import small_config

COSTS = PassCosts(
    layer_forward=10.0,
    layer_backward=20.0,
    head_forward=(1.0, 2.0, 3.0),
    head_backward=(4.0, 5.0, 6.0),
    loss=100.0,
    copy=1000.0,
    embedding=8.0,
    slice_statistics=0.5,
    slice_gradients=1.5,
)
FIRST = StageContents(num_trunk=3, heads=range(0), has_embedding=True, rows=0)
MIDDLE = StageContents(num_trunk=2, heads=range(0), has_embedding=False, rows=0)


def test_trunk_passes():
    """The embedding's lookup and its gradient are half of its cost each; recomputation repeats the layers' forward."""
    assert COSTS.trunk_forward(FIRST) == 3 * 10 + 4
    assert COSTS.trunk_forward(MIDDLE) == 2 * 10
    assert COSTS.trunk_backward(FIRST, recompute=False) == 3 * 20 + 4
    assert COSTS.trunk_backward(FIRST, recompute=True) == 3 * (20 + 10) + 4


def test_heads_and_their_losses():
    assert COSTS.heads_forward(range(1, 3)) == 2 + 3
    assert COSTS.heads_backward(range(1, 3)) == 5 + 6
    assert COSTS.heads_and_losses(range(1, 3)) == (2 + 3) + (5 + 6) + 2 * 100 + 1000
    assert COSTS.heads_and_losses(range(0)) == 0


@pytest.mark.parametrize("windows", [1, 3])
def test_flops_of_a_micro_batch(windows):
    """Products alone: of 4 * 16 * 16 weights in attention, 3 * 16 * 24 in the MLP, 97 * 16 in the unembedding.

    Attention itself, 12 positions over width 16, is counted at half, because it is causal.
    """
    costs = flop_costs(small_config(train__micro_batch_size=windows, train__global_batch_tokens=12 * 2 * windows))
    positions = 12 * windows
    layer = positions * (2 * (4 * 16 * 16 + 3 * 16 * 24) + 2 * 12 * 16)
    assert (costs.layer_forward, costs.layer_backward) == (layer, 2 * layer)
    assert costs.head_forward == (layer, layer) and costs.head_backward == (2 * layer, 2 * layer)
    assert costs.loss == positions * 3 * (2 * 97 * 16)
    assert 97 * (costs.slice_statistics + costs.slice_gradients) == costs.loss
    assert costs.copy == costs.embedding == 0

"""Costs of a stage's passes against values computed by hand."""

import pytest

from megamtp.planning.gpus import GPUS
from megamtp.planning.pass_costs import PassCosts, flop_costs
from megamtp.planning.pass_seconds import pass_seconds
from megamtp.planning.stage_memory import StageContents
from tests.cases import pipeline_config, small_config

COSTS = PassCosts(
    layer_forward=10.0,
    layer_backward=20.0,
    head_forward=(1.0, 2.0, 3.0),
    head_backward=(4.0, 5.0, 6.0),
    loss=100.0,
    unembedding_copy=1000.0,
    embedding=8.0,
    slice_statistics=0.5,
    slice_gradients=1.5,
)
FIRST = StageContents(num_trunk_layers=3, heads=range(0), has_embedding=True, rows=0)
MIDDLE = StageContents(num_trunk_layers=2, heads=range(0), has_embedding=False, rows=0)


def test_trunk_passes():
    """Lookup and gradient each have half the cost of the embedding. Recomputation repeats the layers' forward pass."""
    assert COSTS.trunk_forward(FIRST) == 3 * 10 + 4
    assert COSTS.trunk_forward(MIDDLE) == 2 * 10
    assert COSTS.trunk_backward(FIRST, recompute=False) == 3 * 20 + 4
    assert COSTS.trunk_backward(FIRST, recompute=True) == 3 * (20 + 10) + 4


def test_heads_and_their_losses():
    assert COSTS.heads_forward(range(1, 3)) == 2 + 3
    assert COSTS.heads_backward(range(1, 3)) == 5 + 6
    assert COSTS.losses(range(1, 3)) == 2 * 100 + 1000
    assert COSTS.losses(range(0)) == 0


@pytest.mark.parametrize("windows", [1, 3])
def test_flops_of_a_micro_batch(windows):
    """Counts products with 4 * 16 * 16 weights in attention, 3 * 16 * 24 in the MLP and 97 * 16 in the unembedding.

    The attention products, 12 positions of width 16, count half, because attention is causal.
    """
    costs = flop_costs(small_config(train__micro_batch_size=windows, train__global_batch_tokens=12 * 2 * windows))
    positions = 12 * windows
    layer = positions * (2 * (4 * 16 * 16 + 3 * 16 * 24) + 2 * 12 * 16)
    assert (costs.layer_forward, costs.layer_backward) == (layer, 2 * layer)
    assert costs.head_forward == (layer, layer) and costs.head_backward == (2 * layer, 2 * layer)
    assert costs.loss == positions * 3 * (2 * 97 * 16)
    assert 97 * (costs.slice_statistics + costs.slice_gradients) == costs.loss
    assert costs.unembedding_copy == costs.embedding == 0


def test_each_head_pays_for_its_own_unembedding():
    shared, replicated = (
        pass_seconds(pipeline_config("6.7b", 4, f"model.unembedding={unembedding}"), GPUS["h100"])
        for unembedding in ("shared", "replicated")
    )
    assert shared.unembedding_copy > 0 == replicated.unembedding_copy
    assert replicated.losses(range(3)) == pytest.approx(3 * (shared.loss + shared.unembedding_copy))

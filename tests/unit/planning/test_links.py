"""Times of transfers between stages against values computed by hand."""

import pytest

from megamtp.planning.links import Link
from megamtp.planning.spread_schedule import TransferTimes
from tests.cases import paper_config, small_config


def test_link_times():
    config = paper_config("6.7b")
    transfer_times = Link(50e9, 1e-5).transfer_times(config)
    boundary = 4096 * 4096 * 2 / 50e9
    assert transfer_times == TransferTimes(
        pytest.approx(1e-5 + boundary), pytest.approx(7e-5 + boundary), pytest.approx(7e-5 + 7 * 49152 / 50e9)
    )
    reduction = Link(50e9, 0.0).unembedding_reduction(config, 2)
    assert reduction == pytest.approx(4 * 32001 * 4096 / 50e9)
    assert Link(50e9, 1.0).unembedding_reduction(config, 1) == 0.0
    replicated = paper_config("6.7b", "model.unembedding=replicated")
    assert Link(50e9, 1.0).unembedding_reduction(replicated, 2) == 0.0


def test_only_latency_grows_with_the_number_of_hops():
    link = Link(bandwidth=100.0, latency=0.5)
    assert link.seconds(300) == 3.5
    assert link.seconds(300, num_hops=4) == 5.0


def test_unembedding_reduction_runs_along_a_chain_in_both_directions():
    """Two thirds of 4 * 97 * 16 + 4 * 16 bytes over two hops, in each direction."""
    config = small_config(1, 4, engine__kind="pipeline", engine__num_stages=3)
    reduction = Link(bandwidth=8.0, latency=1.0).unembedding_reduction(config, 3)
    assert reduction == pytest.approx(2 * (2 + 4 * 98 * 16 * 2 / 3 / 8))

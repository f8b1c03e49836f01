"""How long transfers between stages take, by hand."""

import pytest

from megamtp.planning.links import Link
from megamtp.planning.spread_schedule import Exchange
from tests.cases import paper_config, small_config


def test_link_times():
    config = paper_config("6.7b")
    exchange = Link(50e9, 1e-5).exchange(config)
    boundary = 4096 * 4096 * 2 / 50e9
    assert exchange == Exchange(
        pytest.approx(1e-5 + boundary), pytest.approx(7e-5 + boundary), pytest.approx(7e-5 + 7 * 49152 / 50e9)
    )
    tied = Link(50e9, 0.0).tied(config, 2)
    assert tied == pytest.approx(4 * 32001 * 4096 / 50e9)
    assert Link(50e9, 1.0).tied(config, 1) == 0.0


def test_a_transfer_waits_for_every_hop_and_for_its_bytes_once():
    link = Link(bandwidth=100.0, latency=0.5)
    assert link.seconds(300) == 3.5
    assert link.seconds(300, hops=4) == 5.0


def test_copies_of_the_unembedding_are_summed_in_a_chain_and_sent_back():
    """Two thirds of 4 * 97 * 16 + 4 * 16 bytes and two hops, there and back."""
    config = small_config(1, 4, engine__kind="pipeline", engine__num_stages=3)
    assert Link(bandwidth=8.0, latency=1.0).tied(config, 3) == pytest.approx(2 * (2 + 4 * 98 * 16 * 2 / 3 / 8))

"""How long transfers between stages take, by hand."""

import pytest

from megamtp.planning.links import Link
from megamtp.planning.spread_schedule import Exchange
from tests.cases import paper_config


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

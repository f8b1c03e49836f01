"""What a pipeline says about the other kind of losses than it has: its best plan, and which of them is faster."""

import dataclasses

import pytest

from megamtp.config import Config
from megamtp.planning.links import NOMINAL
from megamtp.planning.loss_choice import compared
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition, best_cut
from tests.cases import paper_config, small_config


def step(cut: Partition | SpreadPartition, config: Config) -> float:
    exchange = NOMINAL.exchange(config)
    if isinstance(cut, SpreadPartition):
        return max(done.end for done in cut.schedule.play())
    return max(work.end for work in cut.play(exchange.hand))


@pytest.mark.parametrize("spread_losses", [False, True])
def test_the_faster_kind_is_named_whichever_a_run_has(spread_losses):
    own = paper_config("6.7b", f"engine.spread_losses={str(spread_losses).lower()}")
    other = dataclasses.replace(own, engine=dataclasses.replace(own.engine, spread_losses=not spread_losses))
    found, alternative = best_cut(own, 1), best_cut(other, 1)
    assert (
        isinstance(found, SpreadPartition) == spread_losses
        and isinstance(alternative, SpreadPartition) != spread_losses
    )
    ratio = step(alternative, other) / step(found, own)
    assert (ratio > 1) == spread_losses  # whole layers of this model are far from even
    setting = f"engine.spread_losses={str(not spread_losses).lower()}"
    first, second = compared(own, 1, found).splitlines()
    assert first.startswith(f"with {setting}: layers [4, 4, ") and first.endswith(alternative.outcome)
    word = "not predicted to be faster" if spread_losses else "predicted to be faster"
    assert second == f"{setting} is {word}: a step in {ratio:.3f} of the time, on H100s with 50 GB/s between stages"


def test_slow_links_make_whole_losses_the_faster_ones():
    """A model so small that its transfers take longer than its passes."""
    config = small_config(1, 4, engine__kind="pipeline", engine__num_stages=2)
    assert "engine.spread_losses=true is not predicted to be faster" in compared(config, 1, best_cut(config, 1))


def test_a_plan_that_does_not_fit_is_no_alternative():
    settings = dict(engine__kind="pipeline", engine__num_stages=3, model__num_layers=9, model__vocab_size=600)
    whole = best_cut(small_config(1, 6, **settings), 1)
    limit = max(sum(stage.memory_bytes.values()) for stage in whole.stages)
    config = small_config(1, 6, **settings, engine__stage_memory_bytes=limit)
    assert compared(config, 1, whole).startswith(
        "with engine.spread_losses=true: spread losses do not fit engine.stage_memory_bytes="
    )

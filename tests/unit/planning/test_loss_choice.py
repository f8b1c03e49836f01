"""A pipeline reports the best partition with the other placement of losses, and which of the two is faster."""

import dataclasses

import pytest

from megamtp.config import Config
from megamtp.planning.links import NOMINAL_LINK
from megamtp.planning.loss_choice import describe_other_placement
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition, best_partition
from tests.cases import paper_config, small_config


def step_time(partition: Partition | SpreadPartition, config: Config) -> float:
    if isinstance(partition, SpreadPartition):
        return max(timed_pass.end for timed_pass in partition.schedule.simulate())
    transfer_time = NOMINAL_LINK.transfer_times(config).send_activation
    return max(timed_pass.end for timed_pass in partition.simulate(transfer_time))


@pytest.mark.parametrize("spread_losses", [False, True])
def test_faster_placement_is_reported(spread_losses):
    config = paper_config("6.7b", f"engine.spread_losses={str(spread_losses).lower()}")
    other = dataclasses.replace(config, engine=dataclasses.replace(config.engine, spread_losses=not spread_losses))
    partition, alternative = best_partition(config, 1), best_partition(other, 1)
    assert isinstance(partition, SpreadPartition) == spread_losses
    assert isinstance(alternative, SpreadPartition) != spread_losses
    ratio = step_time(alternative, other) / step_time(partition, config)
    assert (ratio > 1) == spread_losses  # the stages of this model are far from even with whole losses
    setting = f"engine.spread_losses={str(not spread_losses).lower()}"
    first, second = describe_other_placement(config, 1, partition).splitlines()
    assert first.startswith(f"with {setting}: layers [4, 4, ") and first.endswith(alternative.balance_summary)
    verdict = "not predicted to be faster" if spread_losses else "predicted to be faster"
    assert second == f"{setting} is {verdict}: {ratio:.3f} times the step time, on H100s with 50 GB/s between stages"


def test_whole_losses_are_faster_on_slow_links():
    """The model is so small that its transfers take longer than its passes."""
    config = small_config(1, 4, engine__kind="pipeline", engine__num_stages=2)
    report = describe_other_placement(config, 1, best_partition(config, 1))
    assert "engine.spread_losses=true is not predicted to be faster" in report


def test_placement_that_does_not_fit_is_reported():
    settings = dict(engine__kind="pipeline", engine__num_stages=3, model__num_layers=9, model__vocab_size=600)
    whole = best_partition(small_config(1, 6, **settings), 1)
    limit = max(sum(stage.memory_bytes.values()) for stage in whole.stages)
    config = small_config(1, 6, **settings, engine__stage_memory_bytes=limit)
    assert describe_other_placement(config, 1, whole).startswith(
        "with engine.spread_losses=true: spread losses do not fit engine.stage_memory_bytes="
    )

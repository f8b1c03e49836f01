"""The checks of an engine's configuration, and each rank's share of the data."""

import pytest

from megamtp.engines.check import check_engine
from megamtp.errors import InputError
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition
from tests.cases import small_config

PIPELINE = {"engine__kind": "pipeline", "engine__num_stages": 2}


def test_all_ranks_read_different_data_under_zero():
    assert check_engine(small_config(4), rank=3, world_size=4) == ((3, 4), None)


def test_neighbouring_ranks_run_the_same_stage_of_different_pipelines():
    """Ranks 0 and 1 run the first stage, ranks 2 and 3 the second."""
    results = [check_engine(small_config(2, 4, **PIPELINE), rank, 4) for rank in range(4)]
    assert [rank_and_size for rank_and_size, _ in results] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert all(isinstance(partition, Partition) and len(partition.stages) == 2 for _, partition in results)


def test_spread_losses_have_a_spread_partition():
    _, partition = check_engine(small_config(2, 4, **PIPELINE, engine__spread_losses=True), 0, 4)
    assert isinstance(partition, SpreadPartition) and len(partition.stages) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__head_kind": "deep"}, "model.head_kind=deep; expected parallel"),
        ({"optimizer__kind": "adam"}, "optimizer.kind=adam; expected adamw"),
        ({"engine__deepspeed__gradient_clipping": 1}, "engine.deepspeed.gradient_clipping conflicts"),
        ({"engine__kind": "pipeline", "engine__num_stages": 3}, "4 ranks cannot be divided among engine.num_stages=3"),
        (PIPELINE | {"engine__stage_memory_bytes": 10}, "no partition of 5 layers into 2 stages fits"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, words):
    with pytest.raises(InputError) as error:
        check_engine(small_config(4, 2, **settings), 0, 4)
    assert words in str(error.value)

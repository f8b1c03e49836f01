"""What is found wrong about an engine before ranks meet, and the place of each rank in the data."""

import pytest

from megamtp.engines.check import check_engine
from megamtp.errors import InputError
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition
from tests.cases import small_config

PIPELINE = {"engine__kind": "pipeline", "engine__num_stages": 2}


def test_zero_shares_the_data_among_all_ranks():
    assert check_engine(small_config(4), rank=3, world_size=4) == ((3, 4), None)


def test_neighbouring_ranks_of_a_pipeline_have_one_stage_of_different_pipelines():
    """Ranks 0 and 1 have the first stage, 2 and 3 the second."""
    found = [check_engine(small_config(2, 4, **PIPELINE), rank, 4) for rank in range(4)]
    assert [place for place, _ in found] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert all(isinstance(cut, Partition) and len(cut.stages) == 2 for _, cut in found)


def test_spread_losses_have_a_cut_of_their_own():
    _, cut = check_engine(small_config(2, 4, **PIPELINE, engine__spread_losses=True), 0, 4)
    assert isinstance(cut, SpreadPartition) and len(cut.stages) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__head_kind": "deep"}, "model.head_kind=deep; expected parallel"),
        ({"optimizer__kind": "adam"}, "optimizer.kind=adam; expected adamw"),
        ({"engine__deepspeed__gradient_clipping": 1}, "engine.deepspeed.gradient_clipping clashes"),
        ({"engine__kind": "pipeline", "engine__num_stages": 3}, "4 ranks do not divide among engine.num_stages=3"),
        (PIPELINE | {"engine__stage_memory_bytes": 10}, "no cut of 5 layers into 2 stages fits"),
    ],
)
def test_what_does_not_go_together_is_named(settings, words):
    with pytest.raises(InputError) as error:
        check_engine(small_config(4, 2, **settings), 0, 4)
    assert words in str(error.value)

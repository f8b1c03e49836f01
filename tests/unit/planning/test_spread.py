"""Partitions with spread losses: rows fill up the faster stages, and stages take equally long."""

import pytest

from megamtp.engines.check import check_engine
from megamtp.errors import InputError
from megamtp.planning.partition import whole_loss_partition
from megamtp.planning.spread import share_rows, spread_loss_partition
from megamtp.planning.spread_schedule import TransferTimes
from tests.cases import paper_config, small_config


@pytest.mark.parametrize(
    ("stage_costs", "num_rows", "multiple", "expected"),
    [
        ([1.0, 1.0], 10, 1, [5, 5]),
        ([4.0, 1.0, 1.0], 6, 1, [0, 3, 3]),
        ([1.0, 3.0, 2.0], 6, 1, [3, 1, 2]),
        ([0.0, 100.0], 7, 4, [7, 0]),
        ([1.0, 1.0, 1.0], 300, 128, [128, 128, 44]),
    ],
)
def test_rows_fill_up_the_faster_stages(stage_costs, num_rows, multiple, expected):
    assert share_rows(stage_costs, 1.0, num_rows, multiple) == expected


@pytest.mark.parametrize("size", ["6.7b", "13b"])
@pytest.mark.parametrize("vocabulary", [32000, 128256])
@pytest.mark.parametrize("stages", [4, 8])
def test_spread_losses_balance_the_papers_sizes(size, vocabulary, stages):
    config = paper_config(size, f"model.vocab_size={vocabulary}", f"engine.num_stages={stages}")
    whole = whole_loss_partition(config, 1)
    spread = spread_loss_partition(config, 1, transfer_times=TransferTimes())
    assert spread.imbalance <= min(1.003, whole.imbalance)
    assert sum(stage.contents.rows for stage in spread.stages) == vocabulary
    assert spread.step_time(TransferTimes()) < max(timed_pass.end for timed_pass in whole.simulate())
    total = sum(times.total(4) for times in spread.schedule.times)
    assert total == pytest.approx(sum(stage.cost for stage in whole.stages))


def test_memory_counts_each_row_once_and_a_limit_is_kept():
    config = small_config(
        world_size=1,
        accumulation=6,
        engine__kind="pipeline",
        engine__num_stages=3,
        model__num_layers=9,
        model__vocab_size=600,
    )
    spread, whole = spread_loss_partition(config, 1), whole_loss_partition(config, 1)
    weights = [sum(stage.memory_bytes["weights"] for stage in partition.stages) for partition in (spread, whole)]
    num_copies = sum(bool(stage.heads) for stage in whole.stages)
    num_norms = sum(bool(stage.contents.rows) for stage in spread.stages)
    assert weights[0] - 4 * 16 * num_norms == weights[1] - num_copies * 4 * (601 * 16) + 4 * 600 * 16
    lines = spread.summary().splitlines()
    layers = ("embedding, trunk 1-3", "trunk 4-6", "trunk 7, heads 1-2")
    assert [line.split(": ")[-1] for line in lines[:3]] == [
        f"{stage_layers}, {stage.contents.rows} rows of the unembedding"
        for stage_layers, stage in zip(layers, spread.stages, strict=True)
    ]
    assert sum(float(line.split(":")[1].split("%")[0]) for line in lines[:3]) == pytest.approx(100, abs=0.2)
    expected = f"slowest stage / mean {spread.imbalance:.3f}; 6 micro-batches: predicted bubble {spread.bubble:.1%}"
    assert lines[3] == expected
    largest = max(sum(stage.memory_bytes.values()) for stage in spread.stages)
    settings = dict(engine__kind="pipeline", engine__num_stages=3, model__num_layers=9, model__vocab_size=600)
    limited = small_config(1, 6, **settings, engine__stage_memory_bytes=largest)
    assert spread_loss_partition(limited, 1).stages == spread.stages
    with pytest.raises(InputError, match=r"spread losses do not fit engine\.stage_memory_bytes"):
        check_engine(
            small_config(1, 6, **settings, engine__stage_memory_bytes=largest - 1, engine__spread_losses=True), 0, 3
        )

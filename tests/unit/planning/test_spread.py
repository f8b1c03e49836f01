"""Plans whose losses are spread by vocabulary: rows fill the stages up, and stages take equally long."""

import pytest

from megamtp.engines.check import check_engine
from megamtp.errors import InputError
from megamtp.planning.partition import partition
from megamtp.planning.spread import share_rows, spread
from megamtp.planning.spread_schedule import Exchange
from tests.cases import paper_config, small_config


@pytest.mark.parametrize(
    ("levels", "rows", "multiple", "expected"),
    [
        ([1.0, 1.0], 10, 1, [5, 5]),
        ([4.0, 1.0, 1.0], 6, 1, [0, 3, 3]),
        ([1.0, 3.0, 2.0], 6, 1, [3, 1, 2]),
        ([0.0, 100.0], 7, 4, [7, 0]),
        ([1.0, 1.0, 1.0], 300, 128, [128, 128, 44]),
    ],
)
def test_rows_fill_the_stages_up(levels, rows, multiple, expected):
    assert share_rows(levels, 1.0, rows, multiple) == expected


@pytest.mark.parametrize("size", ["6.7b", "13b"])
@pytest.mark.parametrize("vocabulary", [32000, 128256])
@pytest.mark.parametrize("stages", [4, 8])
def test_the_papers_sizes_are_balanced_where_whole_layers_are_not(size, vocabulary, stages):
    config = paper_config(size, f"model.vocab_size={vocabulary}", f"engine.num_stages={stages}")
    whole, found = partition(config, 1), spread(config, 1, exchange=Exchange())
    assert found.imbalance <= min(1.003, whole.imbalance)
    assert sum(stage.contents.rows for stage in found.stages) == vocabulary
    assert max(work.end for work in found.schedule.play()) < max(work.end for work in whole.play())
    total = sum(times.total(4) for times in found.schedule.times)
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
    found, whole = spread(config, 1), partition(config, 1)
    weights = [sum(stage.memory_bytes["weights"] for stage in plan.stages) for plan in (found, whole)]
    copies = sum(bool(stage.heads) for stage in whole.stages)
    norms = sum(bool(stage.contents.rows) for stage in found.stages)
    assert weights[0] - 4 * 16 * norms == weights[1] - copies * 4 * (601 * 16) + 4 * 600 * 16
    lines = found.summary().splitlines()
    assert [line.split(": ")[-1] for line in lines[:3]] == [
        f"{layers}, {stage.contents.rows} rows of the unembedding"
        for layers, stage in zip(("embedding, trunk 1-3", "trunk 4-6", "trunk 7, heads 1-2"), found.stages, strict=True)
    ]
    assert sum(float(line.split(":")[1].split("%")[0]) for line in lines[:3]) == pytest.approx(100, abs=0.2)
    assert (
        lines[3] == f"slowest stage / mean {found.imbalance:.3f}; 6 micro-batches: predicted bubble {found.bubble:.1%}"
    )
    largest = max(sum(stage.memory_bytes.values()) for stage in found.stages)
    limited = dict(engine__kind="pipeline", engine__num_stages=3, model__num_layers=9, model__vocab_size=600)
    assert spread(small_config(1, 6, **limited, engine__stage_memory_bytes=largest), 1).stages == found.stages
    with pytest.raises(InputError, match=r"spread losses do not fit engine\.stage_memory_bytes"):
        check_engine(
            small_config(1, 6, **limited, engine__stage_memory_bytes=largest - 1, engine__spread_losses=True), 0, 3
        )

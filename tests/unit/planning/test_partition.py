"""The best partition against all partitions of small models, and against known results for the paper's sizes."""

import itertools
from itertools import accumulate

import pytest

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.model.cost import flops_per_token, num_parameters
from megamtp.planning.partition import Partition, enough_micro_batches, make_stage, whole_loss_partition
from megamtp.planning.pass_costs import flop_costs
from tests.cases import paper_config, small_config


def all_partitions(config: Config) -> list[Partition]:
    num_layers, num_stages = config.model.num_layers, config.engine.num_stages
    num_micro_batches = config.num_micro_batches(1)
    costs, partitions = flop_costs(config), []
    for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
        bounds = [0, *inner, num_layers]
        stages = [
            make_stage(config, 1, num_micro_batches, i, bounds[i], bounds[i + 1], costs) for i in range(num_stages)
        ]
        partitions.append(Partition(stages, num_micro_batches))
    return partitions


def slowest(partition: Partition) -> int:
    """Returns the cost of the slowest stage."""
    return max(stage.cost for stage in partition.stages)


def largest(partition: Partition) -> int:
    """Returns the memory of the largest stage."""
    return max(sum(stage.memory_bytes.values()) for stage in partition.stages)


@pytest.mark.parametrize(
    ("size", "vocabulary", "expected"), [("6.7b", 32000, 1.163), ("13b", 32000, 1.145), ("6.7b", 128256, 1.307)]
)
def test_imbalance_of_the_best_partitions_of_the_papers_sizes(size, vocabulary, expected):
    partition = whole_loss_partition(paper_config(size, f"model.vocab_size={vocabulary}"), 1)
    assert partition.imbalance == pytest.approx(expected, abs=5e-4)


SHAPES = list(itertools.product((4, 7, 9), (1, 2, 3), (2, 3, 4), (50, 400, 3000), (False, True)))


@pytest.mark.parametrize(("layers", "heads", "stages", "vocabulary", "recompute"), SHAPES)
def test_no_partition_has_a_faster_slowest_stage(layers, heads, stages, vocabulary, recompute):
    config = small_config(
        world_size=1,
        accumulation=6,
        engine__kind="pipeline",
        engine__num_stages=stages,
        model__num_layers=layers,
        model__num_future_tokens=heads,
        model__vocab_size=vocabulary,
        train__activation_checkpointing=recompute,
    )
    assert slowest(whole_loss_partition(config, 1)) == min(map(slowest, all_partitions(config)))


def test_other_stages_are_as_even_as_possible():
    config = small_config(
        world_size=1, engine__kind="pipeline", engine__num_stages=4, model__num_layers=9, model__vocab_size=400
    )

    def unevenness(partition: Partition) -> float:
        return sum(stage.cost**2 for stage in partition.stages)

    partitions = all_partitions(config)
    best = min(map(slowest, partitions))
    expected = min(unevenness(partition) for partition in partitions if slowest(partition) == best)
    assert unevenness(whole_loss_partition(config, 1)) == expected


def test_memory_limit_excludes_only_partitions_above_it():
    settings = dict(
        world_size=1,
        accumulation=6,
        engine__kind="pipeline",
        engine__num_stages=3,
        model__num_layers=9,
        model__vocab_size=600,
        train__sequence_length=256,
        train__global_batch_tokens=2 * 256 * 6,
    )
    partitions = all_partitions(small_config(**settings))
    limits = sorted({largest(partition) for partition in partitions})
    unlimited = whole_loss_partition(small_config(**settings), 1)
    assert largest(unlimited) > limits[0]  # otherwise the limit excludes nothing
    for limit in limits:
        partition = whole_loss_partition(small_config(**settings, engine__stage_memory_bytes=limit), 1)
        assert largest(partition) <= limit
        assert slowest(partition) == min(slowest(other) for other in partitions if largest(other) <= limit)
    with pytest.raises(InputError, match="no partition of 9 layers into 3 stages fits"):
        whole_loss_partition(small_config(**settings, engine__stage_memory_bytes=limits[0] - 1), 1)


def test_stage_layers_determine_the_partition_and_stages_add_up():
    config = small_config(
        world_size=1,
        accumulation=8,
        engine__kind="pipeline",
        engine__num_stages=3,
        engine__stage_layers=[1, 2, 3],
        model__num_layers=6,
        model__num_future_tokens=4,
    )
    partition = whole_loss_partition(config, 1)
    assert [(stage.first, stage.end) for stage in partition.stages] == [(0, 1), (1, 3), (3, 6)]
    assert [list(stage.heads) for stage in partition.stages] == [[], [0], [1, 2, 3]]
    positions = config.train.micro_batch_size * config.train.sequence_length
    assert sum(stage.cost for stage in partition.stages) == positions * flops_per_token(
        config.model, config.train.sequence_length
    )
    weights = sum(stage.memory_bytes["weights"] for stage in partition.stages)
    # Two stages have heads, so there are two copies of the unembedding.
    copy = (config.model.vocab_size + 1) * config.model.dim
    assert weights == 4 * (num_parameters(config.model) + copy)


def test_later_stages_have_fewer_micro_batches_in_flight():
    config = paper_config("6.7b", "engine.stage_layers=[4,4,4,4,4,4,4,4]")
    activations = [stage.memory_bytes["activations"] for stage in whole_loss_partition(config, 1).stages[:7]]
    assert [size * 8 / activations[0] for size in activations] == pytest.approx([8, 7, 6, 5, 4, 3, 2])
    two_micro_batches = paper_config(
        "6.7b", "engine.stage_layers=[4,4,4,4,4,4,4,4]", f"train.global_batch_tokens={2 * 4096}"
    )
    first_stage = whole_loss_partition(two_micro_batches, 1).stages[0]
    assert first_stage.memory_bytes["activations"] * 8 == activations[0] * 2


def test_bubble_of_equal_stages():
    config = small_config(
        world_size=1,
        accumulation=6,
        engine__kind="pipeline",
        engine__num_stages=3,
        engine__stage_layers=[2, 2, 2],
        model__num_layers=6,
        model__num_future_tokens=1,
        model__vocab_size=1,
    )
    partition = whole_loss_partition(config, 1)
    assert partition.bubble == pytest.approx(2 / (6 + 2), rel=1e-2)
    assert partition.num_micro_batches < enough_micro_batches(3) == 12
    assert list(accumulate(config.engine.stage_layers)) == [stage.end for stage in partition.stages]


def test_summary_has_a_line_for_each_stage():
    partition = whole_loss_partition(paper_config("6.7b"), 1)
    lines = partition.summary().splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("stage 0:") and "embedding, trunk 1-" in lines[0]
    assert "heads" in lines[7] and lines[7].endswith("4")
    assert lines[8] == "slowest stage / mean 1.163; 32 micro-batches: predicted bubble " + f"{partition.bubble:.1%}"
    shares = [float(line.split(":")[1].split("%")[0]) for line in lines[:8]]
    assert sum(shares) == pytest.approx(100, abs=0.5)

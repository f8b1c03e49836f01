"""The best contiguous cut against every cut there is, and against the best ones that are known for the paper's
sizes.
"""

import itertools
from itertools import accumulate

import pytest

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.model.cost import flops_per_token, parameters
from megamtp.planning.partition import Partition, enough_micro_batches, make_stage, partition
from megamtp.planning.pass_costs import flop_costs
from tests.cases import paper_config, small_config


def all_cuts(config: Config) -> list[Partition]:
    num_layers, num_stages = config.model.num_layers, config.engine.num_stages
    micro_batches = config.accumulation(1)
    costs, found = flop_costs(config), []
    for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
        bounds = [0, *inner, num_layers]
        stages = [make_stage(config, 1, micro_batches, i, bounds[i], bounds[i + 1], costs) for i in range(num_stages)]
        found.append(Partition(stages, micro_batches))
    return found


def slowest(found: Partition) -> int:
    return max(stage.cost for stage in found.stages)


def largest(found: Partition) -> int:
    return max(sum(stage.memory_bytes.values()) for stage in found.stages)


@pytest.mark.parametrize(
    ("size", "vocabulary", "expected"), [("6.7b", 32000, 1.163), ("13b", 32000, 1.145), ("6.7b", 128256, 1.307)]
)
def test_best_contiguous_cuts_of_the_papers_sizes(size, vocabulary, expected):
    found = partition(paper_config(size, f"model.vocab_size={vocabulary}"), 1)
    assert found.imbalance == pytest.approx(expected, abs=5e-4)


SHAPES = list(itertools.product((4, 7, 9), (1, 2, 3), (2, 3, 4), (50, 400, 3000), (False, True)))


@pytest.mark.parametrize(("layers", "heads", "stages", "vocabulary", "recompute"), SHAPES)
def test_no_cut_has_a_faster_slowest_stage(layers, heads, stages, vocabulary, recompute):
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
    found = partition(config, 1)
    assert slowest(found) == min(map(slowest, all_cuts(config)))


def test_the_other_stages_are_as_even_as_can_be():
    config = small_config(
        world_size=1, engine__kind="pipeline", engine__num_stages=4, model__num_layers=9, model__vocab_size=400
    )
    best = min(map(slowest, all_cuts(config)))
    unevenness = lambda found: sum(stage.cost**2 for stage in found.stages)  # noqa: E731
    assert unevenness(partition(config, 1)) == min(unevenness(cut) for cut in all_cuts(config) if slowest(cut) == best)


def test_a_memory_limit_excludes_cuts_and_only_those():
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
    cuts = all_cuts(small_config(**settings))
    limits = sorted({largest(cut) for cut in cuts})
    free = partition(small_config(**settings), 1)
    assert largest(free) > limits[0]  # or the limit would exclude nothing
    for limit in limits:
        found = partition(small_config(**settings, engine__stage_memory_bytes=limit), 1)
        assert largest(found) <= limit
        assert slowest(found) == min(slowest(cut) for cut in cuts if largest(cut) <= limit)
    with pytest.raises(InputError, match="no cut of 9 layers into 3 stages fits"):
        partition(small_config(**settings, engine__stage_memory_bytes=limits[0] - 1), 1)


def test_a_given_cut_is_taken_and_stages_add_up():
    config = small_config(
        world_size=1,
        accumulation=8,
        engine__kind="pipeline",
        engine__num_stages=3,
        engine__stage_layers=[1, 2, 3],
        model__num_layers=6,
        model__num_future_tokens=4,
    )
    found = partition(config, 1)
    assert [(stage.first, stage.end) for stage in found.stages] == [(0, 1), (1, 3), (3, 6)]
    assert [list(stage.heads) for stage in found.stages] == [[], [0], [1, 2, 3]]
    positions = config.train.micro_batch_size * config.train.sequence_length
    assert sum(stage.cost for stage in found.stages) == positions * flops_per_token(
        config.model, config.train.sequence_length
    )
    weights = sum(stage.memory_bytes["weights"] for stage in found.stages)
    # two stages have heads, so the unembedding lies there twice
    copy = (config.model.vocab_size + 1) * config.model.dim
    assert weights == 4 * (parameters(config.model) + copy)


def test_fewer_micro_batches_are_alive_in_later_stages():
    config = paper_config("6.7b", "engine.stage_layers=[4,4,4,4,4,4,4,4]")
    alive = [stage.memory_bytes["activations"] for stage in partition(config, 1).stages[:7]]
    assert [activations * 8 / alive[0] for activations in alive] == pytest.approx([8, 7, 6, 5, 4, 3, 2])
    more_micro_batches = paper_config(
        "6.7b", "engine.stage_layers=[4,4,4,4,4,4,4,4]", f"train.global_batch_tokens={2 * 4096}"
    )
    assert partition(more_micro_batches, 1).stages[0].memory_bytes["activations"] * 8 == alive[0] * 2


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
    found = partition(config, 1)
    assert found.bubble == pytest.approx(2 / (6 + 2), rel=1e-2)
    assert found.micro_batches < enough_micro_batches(3) == 12
    assert list(accumulate(config.engine.stage_layers)) == [stage.end for stage in found.stages]


def test_summary_has_each_stages_share():
    found = partition(paper_config("6.7b"), 1)
    lines = found.summary().splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("stage 0:") and "embedding, trunk 1-" in lines[0]
    assert "heads" in lines[7] and lines[7].endswith("4")
    assert lines[8] == "slowest stage / mean 1.163; 32 micro-batches: predicted bubble " + f"{found.bubble:.1%}"
    shares = [float(line.split(":")[1].split("%")[0]) for line in lines[:8]]
    assert sum(shares) == pytest.approx(100, abs=0.5)

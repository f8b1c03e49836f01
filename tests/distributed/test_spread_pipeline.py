"""The pipeline engine with spread losses: gradients, losses, resumption and weights equal those of other engines.

Targets are ignored unevenly, as in test_pipeline.py. Partitions have heads on one or several stages, and a stage with
only heads.
"""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamtp.checkpoint import store
from megamtp.engines.base import DTYPES
from megamtp.planning.links import Link
from tests.cases import global_batch, own_share, small_config
from tests.distributed.test_pipeline import BF16_BOUND, BF16_LOSS_BOUND, FP32_BOUND, _counts, _train, _weights
from tests.engine_steps import largest_errors
from tests.ranks import run_ranks
from tests.saved import load_weights, save

SHAPES = {2: (2, 1), 3: (3, 1), 4: (2, 2)}  # ranks: (stages, pipelines)
# ranks: (accumulation, heads, stage layers, precision, recompute trunk, instant transfers). With the nominal link, the
# schedule of such a small model runs all forward passes first. With instant transfers and eight micro-batches, the
# kinds of passes alternate.
CASES = {
    2: [
        (1, 1, [4, 1], "fp32", True, False),
        (4, 4, [1, 4], "fp32", False, False),
        (8, 4, [3, 2], "fp32", False, True),
        (4, 4, [3, 2], "bf16", False, False),
    ],
    3: [
        (4, 2, [2, 1, 2], "fp32", False, False),
        (4, 4, [1, 1, 3], "fp32", True, False),
        (1, 2, [1, 3, 1], "fp32", False, False),
        (8, 4, [2, 1, 2], "fp32", False, True),
        (8, 1, [2, 1, 2], "bf16", True, True),
    ],
    4: [
        (4, 2, [4, 1], "fp32", False, False),
        (1, 2, [3, 2], "fp32", True, False),
        (4, 1, [3, 2], "bf16", False, False),
        (8, 4, [3, 2], "fp32", False, True),
    ],
}


def spread_config(stages: int, pipelines: int, accumulation: int = 2, **settings):
    return small_config(
        pipelines,
        accumulation,
        engine__kind="pipeline",
        engine__num_stages=stages,
        engine__spread_losses=True,
        **settings,
    )


def _rows(engine) -> slice:
    return slice(engine.part.extent.rows.start, engine.part.extent.rows.stop)


def _errors(ranks: int) -> list[tuple[float, float, int, bool]]:
    """Returns (largest gradient error, largest loss error, rows of this stage, whether passes alternate) by case."""
    from megamtp.engines.build import build_engine
    from megamtp.planning import spread

    results, nominal_link = [], spread.NOMINAL_LINK
    for accumulation, n, stage_layers, precision, recompute, instant in CASES[ranks]:
        spread.NOMINAL_LINK = Link(bandwidth=math.inf, latency=0.0) if instant else nominal_link
        config = spread_config(
            *SHAPES[ranks],
            accumulation,
            model__num_future_tokens=n,
            engine__stage_layers=stage_layers,
            train__precision=precision,
            train__activation_checkpointing=recompute,
            head_loss__weights=[1.0, 0.5, 0.75, 0.25][:n],
        )
        engine = build_engine(config)
        alternates = engine.partition.schedule.max_in_flight(engine.stage_module.stage_id) < accumulation
        results.append((*largest_errors(config, engine, num_steps=2), engine.part.stage.contents.rows, alternates))
    return results


@pytest.mark.parametrize("ranks", SHAPES)
def test_gradients_and_losses_equal_the_reference(ranks):
    results = run_ranks(_errors, ranks, ranks)
    for index, case in enumerate(CASES[ranks]):
        for gradient_error, loss_error, _, alternates in (result[index] for result in results):
            assert alternates == case[-1], case
            assert gradient_error < (BF16_BOUND if "bf16" in case else FP32_BOUND), case
            assert loss_error < (BF16_LOSS_BOUND if "bf16" in case else FP32_BOUND), case
        assert sum(result[index][2] for result in results) == 97 * SHAPES[ranks][1]


def _resumed(folder: str, precision: str) -> dict:
    """Trains on from a checkpoint without interruption, in a resumed engine, and in a resumed engine with whole losses.

    Returns losses, weights and evaluations of these engines, and the saved rows of the unembedding.
    """
    from megamtp.engines.build import build_engine

    settings = dict(
        model__num_future_tokens=3, engine__stage_layers=[3, 2], train__precision=precision, run__directory=folder
    )
    config = spread_config(2, 2, 2, **settings)
    engine = build_engine(config)
    _train(config, engine, range(2))
    save(config, engine, 2)
    evaluations = [_evaluated(config, engine)]
    losses, weights = [_train(config, engine, range(2, 5))], [_weights(engine)]
    resumed = build_engine(config)
    _train(config, resumed, range(7, 8))  # so that loading must change the weights
    resumed.load(store.newest_checkpoint(Path(folder)))
    evaluations.append(_evaluated(config, resumed))
    saved = _weights(resumed)["unembedding.weight"].float(), _rows(resumed)
    losses.append(_train(config, resumed, range(2, 5)))
    weights.append(_weights(resumed))
    whole_config = small_config(2, 2, engine__kind="pipeline", engine__num_stages=2, **settings)
    whole = build_engine(whole_config)
    whole.load(store.newest_checkpoint(Path(folder)))
    evaluations.append(_evaluated(whole_config, whole))
    losses.append(_train(whole_config, whole, range(2, 5)))
    equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return {"losses": losses, "weights are equal": equal, "saved": saved, "evaluations": evaluations}


def _evaluated(config, engine) -> list[float]:
    """Returns the sums of an evaluation of five batches per pipeline, which are more than a step has."""
    sums = engine.evaluate(iter(own_share(global_batch(config, 11, 10), engine.data_parallel_rank, 2)))
    dist.all_reduce(sums)
    return sums.tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumption_is_exact_and_whole_losses_can_resume_the_checkpoint(precision, tmp_path):
    results = run_ranks(_resumed, 4, str(tmp_path), precision)
    bound = 1e-6 if precision == "fp32" else BF16_LOSS_BOUND
    for result in results:
        assert result["weights are equal"]
        uninterrupted, resumed, whole = result["losses"]
        assert resumed == uninterrupted
        torch.testing.assert_close(torch.tensor(whole), torch.tensor(uninterrupted), rtol=bound, atol=0)
        uninterrupted, resumed, whole = result["evaluations"]
        assert resumed == uninterrupted
        assert whole == pytest.approx(uninterrupted, rel=bound)
    _, weights = load_weights(store.newest_checkpoint(tmp_path))
    for saved, rows in (result["saved"] for result in results):
        assert torch.equal(weights["unembedding.weight"][rows].to(DTYPES[precision]).float(), saved)
    assert weights["unembedding.weight"].shape == (97, 16)


def test_no_layer_runs_twice_and_the_norms_gradient_is_reduced_once():
    """The final norm is the only parameter with copies if several stages have heads."""
    results = run_ranks(_counts, 3, False, {"engine__spread_losses": True, "engine__stage_layers": [2, 1, 2]})
    forwards, backwards = (sum((result[index] for result in results), Counter()) for index in (0, 1))
    assert (
        forwards
        == backwards
        == {f"{kind}.{index}": 4 for kind, count in (("trunk", 2), ("heads", 3)) for index in range(count)}
    )
    assert [num_calls for _, _, num_calls, _ in results] == [0, 0, 0]  # DeepSpeed itself calls no backward
    assert [reduced for _, _, _, reduced in results] == [[], [16], [16]]


def _kept_in_evaluation() -> tuple[list[int], int]:
    """Returns (loss stages, largest number of micro-batches that this stage keeps in an evaluation of five)."""
    from megamtp.engines.build import build_engine
    from megamtp.engines.spread_passes import SpreadPassRunner

    run, num_kept = SpreadPassRunner.run, [0]

    def counting_run(runner, stage_pass):
        run(runner, stage_pass)
        num_kept[0] = max(num_kept[0], len(runner.states))

    SpreadPassRunner.run = counting_run  # before the engine binds it
    config = spread_config(3, 1, 5, model__num_future_tokens=1, engine__stage_layers=[2, 1, 2])
    engine = build_engine(config)
    engine.evaluate(iter(global_batch(config, 0, 5)))
    return engine.runner.schedule.loss_stages, num_kept[0]


def test_stages_without_losses_keep_no_micro_batches_in_evaluations():
    results = run_ranks(_kept_in_evaluation, 3)
    assert [loss_stages for loss_stages, _ in results] == [[1, 2]] * 3
    assert results[0][1] == 0 and results[1][1] > 0

"""The engines over NCCL on two GPUs: gradients and losses equal the float64 reference, as over gloo.

Run with: bash launch/test.sh tests/gpu
"""

import itertools

import pytest
import torch.distributed as dist

from tests.cases import global_batch, own_share, small_config
from tests.distributed.test_pipeline import pipeline_config
from tests.distributed.test_spread_pipeline import spread_config
from tests.engine_steps import largest_errors
from tests.gpu.test_zero import BOUNDS
from tests.ranks import run_gpu_ranks
from tests.reference import reference_model, reference_step

pytestmark = pytest.mark.gpu(count=2)

SIZES = {"model__mlp_dim": 32, "model__vocab_size": 104}
CASES = [
    *itertools.product(
        ("zero1", "zero3", "zero3, DeepSpeed's communication"), ("fp32", "bf16"), ("sequential",), (1, 4)
    ),
    *itertools.product(("pipeline", "spread pipeline"), ("fp32", "bf16"), ([4, 1],), (1, 2)),
    *itertools.product(("pipeline", "spread pipeline"), ("fp32", "bf16"), ([1, 4],), (4,)),
]


def _config(case: tuple):
    kind, precision, stage_layers, n = case
    settings = {**SIZES, "model__num_future_tokens": n, "train__precision": precision}
    if kind.endswith("pipeline"):
        make = pipeline_config if kind == "pipeline" else spread_config
        return make(2, 1, 4, engine__stage_layers=stage_layers, **settings)
    communication = "deepspeed" if kind.endswith("communication") else "grouped"
    return small_config(2, 2, engine__kind=kind[:5], engine__communication=communication, **settings)


def _errors(cases: list[tuple]) -> list[tuple[float, float]]:
    from megamtp.engines.build import build_engine

    errors = []
    for config in map(_config, cases):
        errors.append(largest_errors(config, build_engine(config), num_steps=3))
    return errors


@pytest.fixture(scope="module")
def errors_of_all() -> dict[str, tuple[float, float]]:
    """Returns each case's largest errors of the two ranks."""
    by_rank = run_gpu_ranks(_errors, 2, CASES)
    return {
        str(case): tuple(map(max, zip(*errors, strict=True)))
        for case, errors in zip(CASES, zip(*by_rank, strict=True), strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_the_reference(case, errors_of_all):
    gradient_error, loss_error = errors_of_all[str(case)]
    gradient_bound, loss_bound = BOUNDS[case[1]]
    assert gradient_error < gradient_bound
    assert loss_error < loss_bound


def _evaluation_errors(kinds: list[str]) -> list[float]:
    """Returns the largest relative error of a head's loss in an evaluation before the first step, for each engine.

    The evaluation has twice as many micro-batches as a step.
    """
    from megamtp.engines.build import build_engine

    errors = []
    for kind in kinds:
        config = _config((kind, "fp32", [3, 2], 2))
        engine, batches = build_engine(config), global_batch(config, 0, 8)
        totals = engine.evaluate(iter(own_share(batches, engine.data_parallel_rank, engine.data_parallel_size)))
        dist.all_reduce(totals)
        nll_sums, counts = totals.view(2, -1).tolist()
        expected = reference_step(config, reference_model(config), batches).losses
        losses = zip(nll_sums, counts, expected, strict=True)
        errors.append(max(abs(nll / count - loss) / loss for nll, count, loss in losses))
    return errors


def test_evaluations_before_the_first_step_equal_the_reference():
    kinds = ["zero3", "pipeline", "spread pipeline"]
    by_rank = run_gpu_ranks(_evaluation_errors, 2, kinds)
    assert all(error < BOUNDS["fp32"][1] for errors in by_rank for error in errors)

"""The pipeline engine with losses spread by vocabulary: gradients, losses, resumption and weights as those of the other engines.

Targets are ignored unevenly, as in test_pipeline.py. Cuts give heads to one stage or to several, and one stage heads alone.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamtp.checkpoint import store
from megamtp.engines.base import DTYPES
from tests.cases import global_batch, own_share, small_config
from tests.distributed.test_pipeline import BF16_BOUND, BF16_LOSS_BOUND, FP32_BOUND, _train, _weights
from tests.engine_steps import largest_errors
from tests.ranks import run_ranks
from tests.saved import load_weights, save

SHAPES = {2: (2, 1), 3: (3, 1), 4: (2, 2)}  # ranks: (stages, pipelines)
CASES = {  # ranks: (accumulation, heads, cut, precision, recompute trunk)
    2: [(1, 1, [4, 1], "fp32", True), (4, 4, [1, 4], "fp32", False), (4, 4, [3, 2], "bf16", False)],
    3: [(4, 2, [2, 1, 2], "fp32", False), (4, 4, [1, 1, 3], "fp32", True), (1, 2, [1, 3, 1], "fp32", False)],
    4: [(4, 2, [4, 1], "fp32", False), (1, 2, [3, 2], "fp32", True), (4, 1, [3, 2], "bf16", False)],
}


def spread_config(stages: int, pipelines: int, accumulation: int = 2, **settings):
    return small_config(
        pipelines, accumulation, engine__kind="pipeline", engine__num_stages=stages, engine__spread_losses=True, **settings
    )


def _rows(engine) -> slice:
    return slice(engine.model.first_row, engine.model.first_row + engine.model.own.contents.rows)


def _errors(ranks: int) -> list[tuple[float, float, int]]:
    """Of each case: the largest relative error of a gradient, that of a loss, and the rows of this stage."""
    from megamtp.engines.build import build_engine

    found = []
    for accumulation, n, cut, precision, recompute in CASES[ranks]:
        config = spread_config(
            *SHAPES[ranks], accumulation, model__num_future_tokens=n, engine__stage_layers=cut, train__precision=precision,
            train__activation_checkpointing=recompute, head_loss__weights=[1.0, 0.5, 0.75, 0.25][:n],
        )  # fmt: skip
        engine = build_engine(config)
        found.append((*largest_errors(config, engine, num_steps=2), engine.model.own.contents.rows))
    return found


@pytest.mark.parametrize("ranks", SHAPES)
def test_gradients_and_losses_equal_the_reference(ranks):
    results = run_ranks(_errors, ranks, ranks)
    for index, case in enumerate(CASES[ranks]):
        for gradient_error, loss_error, _ in (result[index] for result in results):
            assert gradient_error < (BF16_BOUND if "bf16" in case else FP32_BOUND), case
            assert loss_error < (BF16_LOSS_BOUND if "bf16" in case else FP32_BOUND), case
        assert sum(rows for _, _, rows in (result[index] for result in results)) == 97 * SHAPES[ranks][1]


def _resumed(folder: str, precision: str) -> dict:
    """Losses of further steps and weights after them, without and with a resumption, and on an engine whose losses are whole.

    Also an evaluation before and after loading.
    """
    from megamtp.engines.build import build_engine

    settings = dict(model__num_future_tokens=3, engine__stage_layers=[3, 2], train__precision=precision, run__directory=folder)
    config = spread_config(2, 2, 2, **settings)
    engine = build_engine(config)
    _train(config, engine, range(2))
    save(config, engine, 2)
    evaluations = [_evaluated(config, engine)]
    losses, weights = [_train(config, engine, range(2, 5))], [_weights(engine)]
    resumed = build_engine(config)
    _train(config, resumed, range(7, 8))  # away from where it is about to be
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
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return {"losses": losses, "weights are the same": same, "saved": saved, "evaluations": evaluations}


def _evaluated(config, engine) -> list[float]:
    """Of five batches in each pipeline, more than a step has."""
    sums = engine.evaluate(iter(own_share(global_batch(config, 11, 10), engine.data_parallel_rank, 2)))
    dist.all_reduce(sums)
    return sums.tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumption_is_exact_and_engines_with_whole_losses_go_on_with_it(precision, tmp_path):
    results = run_ranks(_resumed, 4, str(tmp_path), precision)
    bound = 1e-6 if precision == "fp32" else BF16_LOSS_BOUND
    for result in results:
        assert result["weights are the same"]
        without, resumed, whole = result["losses"]
        assert resumed == without
        torch.testing.assert_close(torch.tensor(whole), torch.tensor(without), rtol=bound, atol=0)
        before, after, of_whole = result["evaluations"]
        assert after == before
        assert of_whole == pytest.approx(before, rel=bound)
    _, weights = load_weights(store.newest_checkpoint(tmp_path))
    for saved, rows in (result["saved"] for result in results):
        assert torch.equal(weights["unembedding.weight"][rows].to(DTYPES[precision]).float(), saved)
    assert weights["unembedding.weight"].shape == (97, 16)


def _losses(kind: str, sharers: int, settings: dict) -> list[list[float]]:
    from megamtp.engines.build import build_engine

    config = small_config(sharers, 4 // sharers, engine__kind=kind, model__num_future_tokens=3, **settings)
    return _train(config, build_engine(config), [step % 2 for step in range(10)])


def test_losses_of_ten_steps_are_zero1s():
    expected = torch.tensor(run_ranks(_losses, 1, "zero1", 1, {})[0])
    spread_losses = {"engine__num_stages": 3, "engine__spread_losses": True}
    found = torch.tensor(run_ranks(_losses, 3, "pipeline", 1, spread_losses)[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert (expected[0] - expected[8]).min() > 0.1  # something was learned, so that a difference had a way to grow

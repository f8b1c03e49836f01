"""The pipeline engine with losses spread by vocabulary: gradients, losses, resumption and weights as those of the other engines.

Targets are ignored unevenly, as in test_pipeline.py. Cuts give heads to one stage or to several, and one stage heads alone.
"""

import pytest
import torch.distributed as dist

from tests.cases import global_batch, small_config
from tests.distributed.test_pipeline import BF16_BOUND, BF16_LOSS_BOUND, FP32_BOUND
from tests.engine_steps import step_with_gradients
from tests.ranks import run_ranks
from tests.reference import reference_model, reference_step, relative_error

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
            train__activation_checkpointing=recompute, head_loss__weights=[1.0, 0.5, 0.75, 0.25][:n], head_loss__z_loss=0.0,
        )  # fmt: skip
        engine, model = build_engine(config), reference_model(config)
        gradient_error = loss_error = 0.0
        for step in range(2):
            batches = global_batch(config, step, accumulation * engine.data_parallel_size)
            expected = reference_step(config, model, batches)
            result, counts, gradients = step_with_gradients(engine, batches)
            for name, gradient in gradients.items():
                exact = expected.gradients[name][_rows(engine) if name == "unembedding.weight" else ...]
                gradient_error = max(gradient_error, relative_error(gradient, exact))
            nll_sums = result.nll_sums.double()
            dist.all_reduce(nll_sums)
            for nll, count, loss in zip(nll_sums.tolist(), counts, expected.losses, strict=True):
                loss_error = max(loss_error, abs(nll / count - loss) / loss)
            norm = sum(float(exact.norm()) ** 2 for exact in expected.gradients.values()) ** 0.5
            loss_error = max(loss_error, abs(result.gradient_norm - norm) / norm if precision == "fp32" else 0.0)
        found.append((gradient_error, loss_error, engine.model.own.contents.rows))
    return found


@pytest.mark.parametrize("ranks", SHAPES)
def test_gradients_losses_and_norms_equal_the_reference(ranks):
    results = run_ranks(_errors, ranks, ranks)
    for index, case in enumerate(CASES[ranks]):
        for gradient_error, loss_error, _ in (result[index] for result in results):
            assert gradient_error < (BF16_BOUND if "bf16" in case else FP32_BOUND), case
            assert loss_error < (BF16_LOSS_BOUND if "bf16" in case else FP32_BOUND), case
        assert sum(rows for _, _, rows in (result[index] for result in results)) == 97 * SHAPES[ranks][1]

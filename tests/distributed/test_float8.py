"""fp8 losses under the engines, on two ranks: the unembedding is quantised where it is gathered, for all heads."""

import itertools

import pytest

from tests.cases import small_config
from tests.engine_steps import largest_errors
from tests.float8_cases import E4M3_ERROR, E5M2_ERROR
from tests.ranks import run_ranks

CASES = list(itertools.product(("zero1", "zero3"), ("sequential", "deferred")))
# bf16's bound (test_gradients.py), and on the way back through the unembedding one rounding of the weight and one of the gradient.
# A head missing or counted twice errs by 25 % at least.
BOUND = 0.04 + (E4M3_ERROR**2 + E5M2_ERROR**2) ** 0.5
LOSS_BOUND = 2e-3  # bf16's: initial logits are of size 0.1, and 4 % of that is little to a loss of 4.7 nats


def gradient_errors() -> list[tuple[float, float]]:
    from megamtp.engines.zero import ZeroEngine

    errors = []
    for kind, schedule in CASES:
        config = small_config(
            accumulation=2, engine__kind=kind, engine__head_schedule=schedule, model__num_future_tokens=3,
            model__vocab_size=112, train__precision="bf16", head_loss__precision="fp8", head_loss__chunk_rows=16,
        )  # fmt: skip
        errors.append(largest_errors(config, ZeroEngine(config), num_steps=3))
    return errors


@pytest.fixture(scope="module")
def errors_of_all() -> dict[tuple, tuple[float, float]]:
    first_rank, _ = run_ranks(gradient_errors, 2)
    return dict(zip(CASES, first_rank, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_gradients_equal_the_reference(case, errors_of_all):
    gradient_error, loss_error = errors_of_all[case]
    assert gradient_error < BOUND
    assert loss_error < LOSS_BOUND

"""fp8 losses with all engines on two ranks: gradients and losses equal the float64 reference."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megamtp.losses.float8 import Float8Weight
from tests.cases import small_config
from tests.engine_steps import largest_errors
from tests.float8_cases import E4M3_ERROR, E5M2_ERROR
from tests.ranks import run_ranks

CUTS = {
    "pipeline, heads on one stage": [2, 3],
    "pipeline, heads on two stages": [3, 2],
    "pipeline, spread losses": [3, 2],
}
CASES = [  # pipelines run last: after one, DeepSpeed builds no other engine in the same process
    *itertools.product(("zero1", "zero3"), ("sequential", "deferred"), ("shared",)),
    ("zero3", "sequential", "replicated"),
    *((cut, "sequential", "shared") for cut in CUTS),
    ("pipeline, spread losses", "sequential", "replicated"),
]
# bf16's bound (test_gradients.py), and the fp8 rounding of weight and gradient in the backward pass of the unembedding.
# A head that is missing or counted twice causes an error of at least 25 %.
BOUND = 0.04 + (E4M3_ERROR**2 + E5M2_ERROR**2) ** 0.5
LOSS_BOUND = 2e-3  # as in bf16: initial logits are about 0.1, and 4 % of that is little in a loss of 4.7 nats


def gradient_errors() -> list[tuple[float, float]]:
    """Returns (largest gradient error, largest loss error) of each case."""
    from megamtp.engines.build import build_engine

    errors = []
    for kind, schedule, unembedding in CASES:
        cut = {"engine__num_stages": 2, "engine__stage_layers": CUTS[kind]} if kind in CUTS else {}
        cut |= {"engine__spread_losses": True} if "spread" in kind else {}
        config = small_config(
            1 if cut else 2,
            accumulation=2,
            engine__kind=kind.split(",")[0],
            engine__head_schedule=schedule,
            model__num_future_tokens=3,
            model__vocab_size=112,
            model__unembedding=unembedding,
            model__num_layers=3,
            model__match_parameters=False,
            train__precision="bf16",
            head_loss__precision="fp8",
            head_loss__chunk_rows=16,
            **cut,
        )
        with recorded_factors() as factors:
            errors.append(largest_errors(config, build_engine(config), num_steps=3))
        ranks_with_losses = {"pipeline, heads on one stage": [1]}.get(kind, [0, 1])
        # fp8 products must run on the ranks with losses, and on no other rank.
        assert (dist.get_rank() in ranks_with_losses) == bool(factors)
    return errors


@contextlib.contextmanager
def recorded_factors() -> Iterator[list[float]]:
    """Yields a list that receives the factor of each use of an fp8 unembedding."""
    factors, products = [], Float8Weight.products

    def recording_products(self: Float8Weight, weight, hidden, factor):
        factors.append(factor)
        return products(self, weight, hidden, factor)

    Float8Weight.products = recording_products
    try:
        yield factors
    finally:
        Float8Weight.products = products


@pytest.fixture(scope="module")
def errors_of_all() -> dict[tuple, tuple[float, float]]:
    """Returns the largest errors over both ranks, by case."""
    by_rank = run_ranks(gradient_errors, 2)
    return {
        case: tuple(map(max, zip(*errors, strict=True)))
        for case, errors in zip(CASES, zip(*by_rank, strict=True), strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_gradients_equal_the_reference(case, errors_of_all):
    gradient_error, loss_error = errors_of_all[case]
    assert gradient_error < BOUND
    assert loss_error < LOSS_BOUND

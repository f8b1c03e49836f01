"""Compares the losses of trainings: one result per seed, variant and head, their table, and verdicts.

Tests: tests/unit/tools/benchmarks/test_learning.py.
"""

import math

import numpy as np

from benchmarks import output
from benchmarks.trainings import TrainingLosses

FAULT = "fault"  # the variant that should exceed the bound
BOUND = 0.005  # largest relative difference of a validation loss
NUM_ERRORS = 2  # standard errors by which the gap may grow
LAST_STEPS = 100  # the final training loss is the mean over these steps
POINT_STEPS, MAX_POINTS = 20, 150  # a point of a curve is the mean over so many steps, or more if there are many
Losses = dict[tuple[int, str], TrainingLosses]  # by (seed, variant)


def steps_a_point(num_steps: int) -> int:
    """Returns over how many steps a point of a curve is the mean."""
    return max(POINT_STEPS, math.ceil(num_steps / MAX_POINTS))


def thirds(num_steps: int) -> tuple[int, int]:
    """Returns how many steps precede the middle and the last third."""
    return num_steps // 3, 2 * num_steps // 3


def results(losses: Losses) -> list[dict]:
    """Returns one result per seed, variant and head.

    A result has losses in nats per token, differences relative to the first variant of the same seed, and the curve of
    the training. Losses that are not finite, and what depends on them, are None.
    """
    (_, first), *_ = losses
    return [row for (seed, variant), own in losses.items() for row in _rows(seed, variant, own, losses[seed, first])]


def _rows(seed: int, variant: str, own: TrainingLosses, first: TrainingLosses) -> list[dict]:
    """A shorter training is compared with the same steps of the first variant, and has thirds of its own."""
    num_steps, num_heads = own.training.shape
    reference = first.training[:num_steps]
    differences = own.training / reference - 1
    last, first_last = (training[-LAST_STEPS:].mean(0) for training in (own.training, reference))
    step = max(own.validations.keys() & first.validations.keys(), default=0)
    nothing = np.full(num_heads, math.nan)
    validation, first_validation = (each.validations.get(step, nothing) for each in (own, first))
    width = steps_a_point(len(first.training))
    curve = own.curve(width).round(4)
    middle, end = thirds(num_steps)
    return [
        {
            "seed": seed,
            "variant": variant,
            "head": head + 1,
            "step": step,
            "diverged": own.diverged,
            "training": _finite(last[head]),
            "training_difference": _finite(last[head] / first_last[head] - 1),
            "validation": _finite(validation[head]),
            "validation_difference": _finite(validation[head] / first_validation[head] - 1),
            "middle_third": _mean_and_error(differences[middle:end, head]),
            "last_third": _mean_and_error(differences[end:, head]),
            "steps_a_point": width,
            "curve": list(map(_finite, curve[:, head])),
        }
        for head in range(num_heads)
    ]


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def _mean_and_error(differences: np.ndarray) -> list[float] | None:
    """Returns the mean and its standard error; None without two finite differences.

    Differences of neighbouring steps are similar, so the error is that of the mean of POINT_STEPS steps, if there are
    at least two such means.
    """
    if len(differences) < 2 or not np.isfinite(differences).all():
        return None
    num_means = len(differences) // POINT_STEPS
    means = differences[: num_means * POINT_STEPS].reshape(num_means, -1).mean(1) if num_means > 1 else differences
    return [float(differences.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))]


def tables(results: list[dict]) -> str:
    return "\n\n".join([_table(results), *_verdicts(results)])


def _table(results: list[dict]) -> str:
    """Results of older versions have no seed and no thirds."""
    header = ["seed", "losses", "head", "training loss", "difference", "validation loss", "difference"]
    return output.table(
        [*header, "training, middle third", "training, last third"],
        [
            [
                str(r.get("seed", 0)),
                r["variant"],
                str(r["head"]),
                _cell(r["training"], ".4f"),
                _cell(r["training_difference"], "+.2%"),
                _cell(r["validation"], ".4f"),
                _cell(r["validation_difference"], "+.2%"),
                *(_third(r.get(f"{name}_third")) for name in ("middle", "last")),
            ]
            for r in results
        ],
    )


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _third(mean_and_error: list[float] | None) -> str:
    return "-" if mean_and_error is None else "{:+.3%} ± {:.3%}".format(*mean_and_error)


def _verdicts(results: list[dict]) -> list[str]:
    """Returns lines about each variant but the first, and then about the difference between seeds."""
    first = results[0]["variant"]
    by_variant: dict[str, list[dict]] = {}
    for result in results:
        by_variant.setdefault(result["variant"], []).append(result)
    lines = []
    for variant, rows in by_variant.items():
        if variant == FAULT:
            lines.append(_control_verdict(first, rows))
        elif variant != first:
            lines.append(_bound_verdict(first, rows))
            lines += [_gap_verdict(rows)] if all(row.get("middle_third") for row in rows) else []
    if len({row.get("seed", 0) for row in by_variant[first]}) > 1:
        lines.append(_difference_between_seeds(by_variant[first]))
    return lines


def _magnitude(row: dict) -> float:
    """Returns the magnitude of the validation loss's difference; infinity if the training has no finite loss."""
    difference = row["validation_difference"]
    return math.inf if row.get("diverged") or difference is None else abs(difference)


def _bound_verdict(first: str, rows: list[dict]) -> str:
    differences = list(map(_magnitude, rows))
    within = sum(difference <= BOUND for difference in differences)
    return (
        f"{rows[0]['variant']}: validation loss within {BOUND:.1%} of {first}: in {within} of {len(rows)} rows; "
        f"largest difference {max(differences):.2%}: {output.holds_or_fails(within == len(rows))}"
    )


def _gap_verdict(rows: list[dict]) -> str:
    """Heads share the data, so their standard errors are added; seeds are independent."""
    middle, last = ([row[f"{name}_third"] for row in rows] for name in ("middle", "last"))
    middle_gap, last_gap = (abs(sum(mean for mean, _ in third)) / len(rows) for third in (middle, last))
    num_seeds = len({row["seed"] for row in rows})
    variance = 0.0
    for third in (middle, last):
        for seed in {row["seed"] for row in rows}:
            errors = [error for (_, error), row in zip(third, rows, strict=True) if row["seed"] == seed]
            variance += (sum(errors) / len(errors) / num_seeds) ** 2
    error = variance**0.5
    return (
        f"{rows[0]['variant']}: gap of the training loss in the last third {last_gap:.3%} <= in the middle third "
        f"{middle_gap:.3%} + {NUM_ERRORS} standard errors of {error:.3%}: "
        f"{output.holds_or_fails(last_gap <= middle_gap + NUM_ERRORS * error)}"
    )


def _control_verdict(first: str, rows: list[dict]) -> str:
    """The comparison notices the fault if it does so with each seed."""
    shown, noticed = [], True
    for seed in dict.fromkeys(row["seed"] for row in rows):
        of_seed = [row for row in rows if row["seed"] == seed]
        largest = max(map(_magnitude, of_seed))
        noticed = noticed and largest > BOUND
        reached = "not finite" if math.isinf(largest) else f"{largest:.2%}"
        shown.append(f"{reached} (seed {seed}, step {of_seed[0]['step']})")
    return (
        f"{FAULT} (control): largest difference of a validation loss from {first}: {', '.join(shown)}; exceeds "
        f"{BOUND:.1%}, as it should: {output.holds_or_fails(noticed)}"
    )


def _difference_between_seeds(rows: list[dict]) -> str:
    """Relative to the smallest loss."""
    losses: dict[int, list[float]] = {}
    for row in rows:
        losses.setdefault(row["head"], []).append(math.nan if row["validation"] is None else row["validation"])
    shown = ", ".join(f"head {head} {max(values) / min(values) - 1:.2%}" for head, values in losses.items())
    return f"{rows[0]['variant']}: difference of the validation loss between seeds: {shown}"

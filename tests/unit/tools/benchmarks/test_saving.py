"""tools/benchmarks/saving.py finds the steps during which a checkpoint was written."""

from benchmarks import saving


def train(step: int, seconds: float, save: float = 0.0) -> dict:
    return {
        "kind": "train",
        "step": step,
        "seconds": {"train": seconds, "data": 0.25} | ({"save": save} if save else {}),
    }


def test_steps_while_saving():
    """Checkpoints are saved after steps 3 and 6. The first is on disk after step 5; the second is never finished.

    The publication of the first checkpoint is a pause in step 6.
    """
    records = [
        train(1, 9),
        train(2, 9),
        train(3, 1),
        train(4, 2, save=0.5),
        train(5, 2),
        {"kind": "checkpoint", "step": 3},
    ]
    steps = saving.steps_of([*records, train(6, 1, save=0.125), train(7, 2, save=0.5)], save_every=3)
    assert [(step.number, step.seconds, step.pause_seconds, step.saving) for step in steps] == [
        (3, 1.25, 0.0, False),
        (4, 2.25, 0.5, True),
        (5, 2.25, 0.0, True),
        (6, 1.25, 0.125, False),
        (7, 2.25, 0.5, True),
    ]
    assert saving.verdict(steps) == "step while saving / other step: 1.800 <= 1.1: FAILS"
    equal_steps = [train(1, 9), train(2, 9), train(3, 2), train(4, 2, save=9.0)]
    assert (
        saving.verdict(saving.steps_of(equal_steps, save_every=3))
        == "step while saving / other step: 1.000 <= 1.1: holds"
    )

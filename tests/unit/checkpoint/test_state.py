"""The state of a run in a manifest."""

import json
from pathlib import Path

import pytest

from megamtp.checkpoint.state import OptimizerState, RunState, read_state
from megamtp.errors import CheckpointError

COUNTERS = {"global_steps": 9, "global_samples": 18, "skipped_steps": 2}
STATE = RunState(OptimizerState("adamw", ("exp_avg", "exp_avg_sq"), (7, 5)), COUNTERS, {"cur_scale": 4.0}, {"epoch": 1})
WHERE = Path("run/manifest.json")


def test_round_trip_through_json():
    assert read_state(json.loads(json.dumps(STATE.to_json())), WHERE) == STATE


def test_state_of_megamtp_0_1_is_read():
    saved = {"adam_steps": 7, "counters": COUNTERS, "loss_scale": None}
    assert read_state(saved, WHERE) == RunState(OptimizerState("adamw", ("exp_avg", "exp_avg_sq"), (7,)), COUNTERS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", {"kind": "adamw", "tensors": ["exp_avg"]}),
        ("optimizer", None),
        ("counters", {"global_steps": 9}),
        ("counters", {**COUNTERS, "skipped_steps": "two"}),
    ],
)
def test_damaged_state_is_refused_in_one_line(key, value):
    with pytest.raises(CheckpointError, match=r"^run/manifest\.json: the state of the run cannot be read \([^\n]*$"):
        read_state(STATE.to_json() | {key: value}, WHERE)


def test_steps_of_parameter_groups():
    assert [STATE.optimizer.steps_of(group) for group in (0, 1)] == [7, 5]
    with pytest.raises(IndexError):
        STATE.optimizer.steps_of(2)
    assert OptimizerState("adamw", (), (7,)).steps_of(3) == 7  # a single number is for all groups

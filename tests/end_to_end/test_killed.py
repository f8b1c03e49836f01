"""Tests that a run can be killed at any moment. The long version is python -m tests.end_to_end.kill_campaign."""

import pytest

from tests.end_to_end.kill_campaign import Killer, final_state


@pytest.mark.timeout(600)
def test_run_killed_repeatedly_equals_an_uninterrupted_run(arguments, tmp_path, request):
    arguments = [
        *arguments,
        "train.steps=24",
        "run.save_every_steps=2",
        "run.evaluate_every_steps=100",
        "data.validation=null",
    ]
    Killer(arguments, tmp_path / "whole", 0).run_to_the_end()
    killer = Killer(arguments, tmp_path / "killed", 1)
    outcomes = [
        killer.run_killed((0,), saving=True, after_steps=3),
        killer.run_killed((1,), saving=False, after_steps=2),
    ]
    if request.config.getoption("--full"):
        outcomes.append(killer.run_killed((0, 1), saving=True, after_steps=1))
        outcomes.append(killer.run_killed((1,), saving=True, after_steps=1))
    assert all("killed ranks [" in line and "ranks []" not in line for line in outcomes), outcomes
    killer.run_to_the_end()
    assert final_state(tmp_path / "killed") == final_state(tmp_path / "whole")
    assert not list((tmp_path / "killed/checkpoints").glob("*.partial"))

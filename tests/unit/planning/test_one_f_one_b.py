"""The simulated 1F1B schedule: its order is DeepSpeed's, dependencies are kept, and known cases take the known time."""

import itertools

import pytest
from deepspeed.runtime.pipe import schedule

from megamtp.planning.one_f_one_b import pass_order, simulate


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_order_equals_deepspeeds(num_stages, num_micro_batches):
    for stage in range(num_stages):
        indices = {
            schedule.ForwardPass: iter(range(num_micro_batches)),
            schedule.BackwardPass: iter(range(num_micro_batches)),
        }
        expected = [
            (type(command) is schedule.ForwardPass, next(indices[type(command)]))
            for commands in schedule.TrainSchedule(num_micro_batches, num_stages, stage)
            for command in commands
            if type(command) in indices
        ]
        assert pass_order(stage, num_stages, num_micro_batches) == expected


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(1, 3), (2, 1), (3, 6), (4, 2), (4, 16)])
def test_equal_stages_take_m_plus_p_minus_1_periods(num_stages, num_micro_batches):
    timed_passes = simulate([1.0] * num_stages, [2.0] * num_stages, num_micro_batches)
    assert max(timed_pass.end for timed_pass in timed_passes) == 3 * (num_micro_batches + num_stages - 1)


def test_slow_first_stage_determines_the_step_time():
    """It is idle only while the last micro-batch passes through the other stages (forward 2 + 1)."""
    timed_passes = simulate([3.0, 2.0, 1.0], [6.0, 4.0, 2.0], 6)
    assert max(timed_pass.end for timed_pass in timed_passes) == 6 * 9 + 3


def test_transfers_delay_dependent_passes():
    timed_passes = simulate([1.0, 1.0], [1.0, 1.0], 1, transfer_time=0.25)
    assert [(each.stage, each.forward, each.start, each.end) for each in timed_passes] == [
        (0, True, 0.0, 1.0),
        (1, True, 1.25, 2.25),
        (1, False, 2.25, 3.25),
        (0, False, 3.5, 4.5),
    ]


def test_dependencies_are_kept_and_passes_of_a_stage_do_not_overlap():
    timed_passes = simulate([3.0, 1.0, 2.0, 5.0], [4.0, 2.0, 6.0, 1.0], 7, transfer_time=0.5)
    assert len(timed_passes) == 2 * 4 * 7
    ends = {(each.stage, each.forward, each.micro_batch): each.end for each in timed_passes}
    for timed_pass in timed_passes:
        source = timed_pass.stage - 1 if timed_pass.forward else timed_pass.stage + 1
        if 0 <= source < 4:
            assert timed_pass.start >= ends[source, timed_pass.forward, timed_pass.micro_batch] + 0.5
        if not timed_pass.forward:
            assert timed_pass.start >= ends[timed_pass.stage, True, timed_pass.micro_batch]
    for stage in range(4):
        intervals = sorted((each.start, each.end) for each in timed_passes if each.stage == stage)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(intervals))

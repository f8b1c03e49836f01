"""The played 1F1B schedule: the order is DeepSpeed's, nothing starts too early, and known cases take what they must."""

import itertools

import pytest
from deepspeed.runtime.pipe import schedule

from megamtp.planning.one_f_one_b import order, play


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_order_is_deepspeeds(num_stages, micro_batches):
    for stage in range(num_stages):
        numbers = {schedule.ForwardPass: iter(range(micro_batches)), schedule.BackwardPass: iter(range(micro_batches))}
        theirs = [
            (type(command) is schedule.ForwardPass, next(numbers[type(command)]))
            for commands in schedule.TrainSchedule(micro_batches, num_stages, stage)
            for command in commands
            if type(command) in numbers
        ]
        assert order(stage, num_stages, micro_batches) == theirs


@pytest.mark.parametrize(("num_stages", "micro_batches"), [(1, 3), (2, 1), (3, 6), (4, 2), (4, 16)])
def test_equal_stages_take_m_plus_p_minus_1(num_stages, micro_batches):
    played = play([1.0] * num_stages, [2.0] * num_stages, micro_batches)
    assert max(work.end for work in played) == 3 * (micro_batches + num_stages - 1)


def test_a_slow_first_stage_hides_the_others():
    """It works from the start to the end but for the last micro-batch's way through the others; by hand, forward 3 2
    1.
    """
    played = play([3.0, 2.0, 1.0], [6.0, 4.0, 2.0], 6)
    assert max(work.end for work in played) == 6 * 9 + 3


def test_a_link_delays_what_waits_for_it():
    played = play([1.0, 1.0], [1.0, 1.0], 1, link=0.25)
    assert [(work.stage, work.forward, work.start, work.end) for work in played] == [
        (0, True, 0.0, 1.0),
        (1, True, 1.25, 2.25),
        (1, False, 2.25, 3.25),
        (0, False, 3.5, 4.5),
    ]


def test_nothing_starts_before_what_it_needs_and_no_stage_does_two_things():
    played = play([3.0, 1.0, 2.0, 5.0], [4.0, 2.0, 6.0, 1.0], 7, link=0.5)
    assert len(played) == 2 * 4 * 7
    ends = {(work.stage, work.forward, work.micro_batch): work.end for work in played}
    for work in played:
        source = work.stage - 1 if work.forward else work.stage + 1
        if 0 <= source < 4:
            assert work.start >= ends[source, work.forward, work.micro_batch] + 0.5
        if not work.forward:
            assert work.start >= ends[work.stage, True, work.micro_batch]
    for stage in range(4):
        own = sorted((work.start, work.end) for work in played if work.stage == stage)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))

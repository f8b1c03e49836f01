"""The schedule with spread losses: dependencies are kept, transfers do not deadlock, and even stages are not idle."""

import itertools
from collections import defaultdict

import pytest

from megamtp.planning.spread_schedule import (
    PATTERNS,
    PassKind,
    SpreadSchedule,
    StagePass,
    StageTimes,
    Transfer,
    TransferKind,
    TransferTimes,
    fastest_schedule,
)

UNEVEN = [
    StageTimes(1.0, 2.0, 0.1, 0.2, 0),
    StageTimes(0.5, 1.0, 0.4, 0.8, 0),
    StageTimes(0.9, 1.9, 0.0, 0.0, 1),
    StageTimes(1.0, 2.0, 0.2, 0.1, 3),
]
EVEN = [StageTimes(1.0, 2.0, 0.2, 0.4, index == 3) for index in range(4)]
FIRST_STAGE_WITHOUT_LOSSES = [
    StageTimes(1.0, 2.0, 0.0, 0.0, 0),
    StageTimes(1.0, 2.0, 0.0, 0.0, 2),
    StageTimes(1.0, 2.0, 0.25, 0.5, 2),
]
CASES = list(
    itertools.product(
        (UNEVEN, EVEN, UNEVEN[2:], FIRST_STAGE_WITHOUT_LOSSES),
        (1, 3, 9),
        (TransferTimes(), TransferTimes(0.3, 0.2, 0.1)),
        PATTERNS,
    )
)


@pytest.mark.parametrize(("times", "num_micro_batches", "transfer_times", "pattern"), CASES)
def test_passes_start_after_their_data_have_arrived(times, num_micro_batches, transfer_times, pattern):
    schedule = SpreadSchedule(times, num_micro_batches, transfer_times, pattern, slack=transfer_times.send_activation)
    timed_passes = schedule.simulate()
    timed = {timed_pass.stage_pass: timed_pass for timed_pass in timed_passes}
    loss_stages = [index for index, stage in enumerate(times) if stage.statistics or stage.num_heads]
    head_stages = [index for index, stage in enumerate(times) if stage.num_heads]
    passes_per_micro_batch = 2 * len(times) + 2 * len(loss_stages) * len(head_stages)
    assert len(timed) == len(timed_passes) == num_micro_batches * passes_per_micro_batch

    def end(stage: int, kind: PassKind, micro_batch: int, head_stage: int | None = None) -> float:
        return timed[StagePass(stage, kind, stage if head_stage is None else head_stage, micro_batch)].end

    for stage_pass, timed_pass in timed.items():
        stage, index, head_stage = stage_pass.stage, stage_pass.micro_batch, stage_pass.head_stage
        num_heads = times[head_stage].num_heads
        if stage_pass.kind == PassKind.FORWARD and stage:
            assert timed_pass.start >= end(stage - 1, PassKind.FORWARD, index) + transfer_times.send_activation
        if stage_pass.kind == PassKind.STATISTICS:
            delay = num_heads * transfer_times.broadcast_hidden if stage != head_stage else 0.0
            assert timed_pass.start >= end(head_stage, PassKind.FORWARD, index) + delay
            assert timed_pass.end - timed_pass.start == pytest.approx(num_heads * times[stage].statistics)
        if stage_pass.kind == PassKind.GRADIENTS:
            last_end = max(end(other, PassKind.STATISTICS, index, head_stage) for other in loss_stages)
            assert timed_pass.start >= last_end + num_heads * transfer_times.gather_statistics
        if stage_pass.kind == PassKind.BACKWARD:
            assert timed_pass.start >= end(stage, PassKind.FORWARD, index)
            if stage + 1 < len(times):
                assert timed_pass.start >= end(stage + 1, PassKind.BACKWARD, index) + transfer_times.send_activation
            if num_heads:
                last_end = max(end(other, PassKind.GRADIENTS, index, stage) for other in loss_stages)
                assert timed_pass.start >= last_end + num_heads * transfer_times.broadcast_hidden
    by_stage = defaultdict(list)
    for timed_pass in timed_passes:
        by_stage[timed_pass.stage_pass.stage].append(timed_pass)
    for stage, of_stage in by_stage.items():
        assert [timed_pass.stage_pass for timed_pass in of_stage] == schedule.orders[stage]
        assert all(before.end <= after.start for before, after in itertools.pairwise(of_stage))


def _needed_transfers(schedule: SpreadSchedule, stage_pass: StagePass) -> list[Transfer]:
    """Returns the transfers whose data a pass needs."""
    stage, index, head_stage = stage_pass.stage, stage_pass.micro_batch, stage_pass.head_stage
    if stage_pass.kind == PassKind.FORWARD:
        return [Transfer(TransferKind.ACTIVATIONS, stage - 1, index)] if stage else []
    if stage_pass.kind == PassKind.STATISTICS:
        return [Transfer(TransferKind.HIDDEN, head_stage, index)] if stage != head_stage else []
    if stage_pass.kind == PassKind.GRADIENTS:
        return [Transfer(TransferKind.STATISTICS, head_stage, index)]
    needed = [Transfer(TransferKind.GRADIENT, stage + 1, index)] if stage + 1 < len(schedule.times) else []
    return needed + ([Transfer(TransferKind.HIDDEN_GRADIENT, stage, index)] if stage in schedule.head_stages else [])


def _enabled_transfers(schedule: SpreadSchedule, stage_pass: StagePass) -> list[Transfer]:
    """Returns the transfers for which a pass computes its stage's data."""
    if stage_pass.kind == PassKind.FORWARD:
        kinds = [TransferKind.ACTIVATIONS] * (stage_pass.stage + 1 < len(schedule.times))
        kinds += [TransferKind.HIDDEN] * (stage_pass.stage in schedule.head_stages)
    else:
        kinds = {
            PassKind.STATISTICS: [TransferKind.STATISTICS],
            PassKind.GRADIENTS: [TransferKind.HIDDEN_GRADIENT],
            PassKind.BACKWARD: [TransferKind.GRADIENT] * (stage_pass.stage > 0),
        }[stage_pass.kind]
    return [Transfer(kind, stage_pass.head_stage, stage_pass.micro_batch) for kind in kinds]


@pytest.mark.parametrize(("times", "num_micro_batches", "transfer_times", "pattern"), CASES)
def test_transfers_in_one_order_do_not_deadlock(times, num_micro_batches, transfer_times, pattern):
    """Stages run their passes and transfers in order until nothing can run any more; then everything must have run.

    A transfer runs when it is the next one of all stages that take part, and these have computed their data. A pass
    runs when the transfers it needs have run.
    """
    schedule = SpreadSchedule(times, num_micro_batches, transfer_times, pattern, slack=transfer_times.send_activation)
    order, stages = schedule.transfers(), range(len(times))
    transfers_per_micro_batch = 2 * (len(times) - 1) + 3 * len(schedule.head_stages)
    assert len(order) == len(set(order)) == num_micro_batches * transfers_per_micro_batch
    transfers = [[transfer for transfer in order if schedule.takes_part(stage, transfer)] for stage in stages]
    passes = [list(stage_passes) for stage_passes in schedule.orders]
    computed, finished, progress = set(), set(), True
    while progress:
        progress = False
        for stage in stages:
            while passes[stage] and finished.issuperset(_needed_transfers(schedule, passes[stage][0])):
                computed.update((stage, transfer) for transfer in _enabled_transfers(schedule, passes[stage].pop(0)))
                progress = True
        for transfer in [waiting[0] for waiting in transfers if waiting]:
            participants = [stage for stage in stages if schedule.takes_part(stage, transfer)]
            ready = all((stage, transfer) in computed for stage in participants if schedule.sends(stage, transfer))
            if ready and all(transfers[stage][:1] == [transfer] for stage in participants):
                finished.add(transfer)
                for stage in participants:
                    transfers[stage].pop(0)
                progress = True
    assert passes == transfers == [[] for _ in stages]


@pytest.mark.parametrize(("times", "num_micro_batches", "transfer_times", "pattern"), CASES)
def test_transfers_start_before_the_pass_that_needs_them(times, num_micro_batches, transfer_times, pattern):
    """Each stage by itself starts its transfers in order, as soon as its own passes have computed the data to send."""
    schedule = SpreadSchedule(times, num_micro_batches, transfer_times, pattern, slack=transfer_times.send_activation)
    for stage, stage_passes in enumerate(schedule.orders):
        waiting = [transfer for transfer in schedule.transfers() if schedule.takes_part(stage, transfer)]
        computed, started = set(), set()
        for stage_pass in stage_passes:
            while waiting and (not schedule.sends(stage, waiting[0]) or waiting[0] in computed):
                started.add(waiting.pop(0))
            assert started.issuperset(_needed_transfers(schedule, stage_pass))
            computed.update(_enabled_transfers(schedule, stage_pass))


def step_time(schedule: SpreadSchedule) -> float:
    return max(timed_pass.end for timed_pass in schedule.simulate())


def test_even_stages_are_never_idle_between_warm_up_and_drain():
    """A step grows by one period per micro-batch. Two or three more micro-batches are in flight than in plain 1F1B."""
    times = [step_time(fastest_schedule(EVEN, count, TransferTimes())) for count in (20, 40)]
    assert times[1] - times[0] == pytest.approx(20 * 3.6)
    schedule = fastest_schedule(EVEN, 20, TransferTimes())
    assert [schedule.max_in_flight(stage) - (4 - stage) for stage in range(4)] in ([2] * 4, [3] * 4)


def test_slack_saves_rounds_when_transfers_take_longer_than_a_slices_passes():
    transfer_times = TransferTimes(send_activation=0.06, broadcast_hidden=0.06, gather_statistics=0.005)
    times = [StageTimes(1.0, 2.0, 0.03, 0.06, index == 7) for index in range(8)]
    without_slack = min(
        (SpreadSchedule(times, 32, transfer_times, pattern) for pattern in PATTERNS),
        key=lambda schedule: schedule.max_in_flight(0),
    )
    fastest = fastest_schedule(times, 32, transfer_times)
    assert without_slack.max_in_flight(0) > 14 > 12 >= fastest.max_in_flight(0)
    assert step_time(fastest) < step_time(without_slack)


def test_with_times_keeps_the_orders():
    schedule = fastest_schedule(EVEN, 6, TransferTimes())
    slower_times = [StageTimes(2.0, 4.0, 0.4, 0.8, stage.num_heads) for stage in EVEN]
    slower = schedule.with_times(slower_times, schedule.transfer_times)
    assert slower.orders == schedule.orders
    assert step_time(slower) == pytest.approx(2 * step_time(schedule))

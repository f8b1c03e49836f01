"""The schedule of losses spread by vocabulary: it keeps every dependency, and stages never wait in a circle."""

import itertools
from collections import defaultdict

import pytest

from megamtp.planning.spread_schedule import (
    PATTERNS,
    Carries,
    Exchange,
    Kind,
    Pass,
    SpreadSchedule,
    StageTimes,
    Transfer,
    fastest_schedule,
)

UNEVEN = [
    StageTimes(1.0, 2.0, 0.1, 0.2, 0),
    StageTimes(0.5, 1.0, 0.4, 0.8, 0),
    StageTimes(0.9, 1.9, 0.0, 0.0, 1),
    StageTimes(1.0, 2.0, 0.2, 0.1, 3),
]


EVEN = [StageTimes(1.0, 2.0, 0.2, 0.4, index == 3) for index in range(4)]


NOTHING = [StageTimes(1.0, 2.0, 0.0, 0.0, 0), StageTimes(1.0, 2.0, 0.0, 0.0, 2), StageTimes(1.0, 2.0, 0.25, 0.5, 2)]


CASES = list(
    itertools.product((UNEVEN, EVEN, UNEVEN[2:], NOTHING), (1, 3, 9), (Exchange(), Exchange(0.3, 0.2, 0.1)), PATTERNS)
)


@pytest.mark.parametrize(("times", "micro_batches", "exchange", "pattern"), CASES)
def test_no_pass_begins_before_its_data_are_there(times, micro_batches, exchange, pattern):
    schedule = SpreadSchedule(times, micro_batches, exchange, pattern, slack=exchange.hand)
    played = schedule.play()
    found = {done.work: done for done in played}
    slices = [stage for stage, own in enumerate(times) if own.statistics or own.num_heads]
    hosts = [stage for stage, own in enumerate(times) if own.num_heads]
    assert len(found) == len(played) == micro_batches * (2 * len(times) + 2 * len(slices) * len(hosts))

    def end(stage: int, kind: Kind, micro_batch: int, host: int | None = None) -> float:
        return found[Pass(stage, kind, stage if host is None else host, micro_batch)].end

    for work, done in found.items():
        stage, index, heads = work.stage, work.micro_batch, times[work.host].num_heads
        if work.kind == Kind.FORWARD and stage:
            assert done.start >= end(stage - 1, Kind.FORWARD, index) + exchange.hand
        if work.kind == Kind.STATISTICS:
            delay = heads * exchange.hidden if stage != work.host else 0.0
            assert done.start >= end(work.host, Kind.FORWARD, index) + delay
            assert done.end - done.start == pytest.approx(heads * times[stage].statistics)
        if work.kind == Kind.GRADIENTS:
            needed = max(end(other, Kind.STATISTICS, index, work.host) for other in slices)
            assert done.start >= needed + heads * exchange.statistics
        if work.kind == Kind.BACKWARD:
            assert done.start >= end(stage, Kind.FORWARD, index)
            if stage + 1 < len(times):
                assert done.start >= end(stage + 1, Kind.BACKWARD, index) + exchange.hand
            if heads:
                needed = max(end(other, Kind.GRADIENTS, index, stage) for other in slices)
                assert done.start >= needed + heads * exchange.hidden
    by_stage = defaultdict(list)
    for done in played:
        by_stage[done.work.stage].append(done)
    for stage, works in by_stage.items():
        assert [done.work for done in works] == schedule.orders[stage]
        assert all(before.end <= after.start for before, after in itertools.pairwise(works))


def _needed(schedule: SpreadSchedule, work: Pass) -> list[Transfer]:
    """What a pass works on."""
    stage, index = work.stage, work.micro_batch
    if work.kind == Kind.FORWARD:
        return [Transfer(Carries.ACTIVATIONS, stage - 1, index)] if stage else []
    if work.kind == Kind.STATISTICS:
        return [Transfer(Carries.HIDDEN, work.host, index)] if stage != work.host else []
    if work.kind == Kind.GRADIENTS:
        return [Transfer(Carries.STATISTICS, work.host, index)]
    needed = [Transfer(Carries.GRADIENT, stage + 1, index)] if stage + 1 < len(schedule.times) else []
    return needed + ([Transfer(Carries.HIDDEN_GRADIENT, stage, index)] if stage in schedule.hosts else [])


def _made(schedule: SpreadSchedule, work: Pass) -> list[Transfer]:
    """What a pass gives its stage to send."""
    if work.kind == Kind.FORWARD:
        carried = [Carries.ACTIVATIONS] * (work.stage + 1 < len(schedule.times)) + [Carries.HIDDEN] * (
            work.stage in schedule.hosts
        )
    else:
        carried = {
            Kind.STATISTICS: [Carries.STATISTICS],
            Kind.GRADIENTS: [Carries.HIDDEN_GRADIENT],
            Kind.BACKWARD: [Carries.GRADIENT] * (work.stage > 0),
        }[work.kind]
    return [Transfer(each, work.host, work.micro_batch) for each in carried]


@pytest.mark.parametrize(("times", "micro_batches", "exchange", "pattern"), CASES)
def test_stages_that_transfer_in_one_order_never_wait_for_each_other_in_a_circle(
    times, micro_batches, exchange, pattern
):
    """A stage makes one transfer after another, each when all who take part have come to it; a pass waits for what
    it needs.
    """
    schedule = SpreadSchedule(times, micro_batches, exchange, pattern, slack=exchange.hand)
    order, stages = schedule.transfers(), range(len(times))
    assert len(order) == len(set(order)) == micro_batches * (2 * (len(times) - 1) + 3 * len(schedule.hosts))
    own = [[transfer for transfer in order if schedule.takes_part(stage, transfer)] for stage in stages]
    works, given, ended, moving = [list(passes) for passes in schedule.orders], set(), set(), True
    while moving:
        moving = False
        for stage in stages:
            while works[stage] and ended.issuperset(_needed(schedule, works[stage][0])):
                given.update((stage, transfer) for transfer in _made(schedule, works[stage].pop(0)))
                moving = True
        for transfer in [transfers[0] for transfers in own if transfers]:
            there = [stage for stage in stages if schedule.takes_part(stage, transfer)]
            made = all((stage, transfer) in given for stage in there if schedule.gives(stage, transfer))
            if made and all(own[stage][:1] == [transfer] for stage in there):
                ended.add(transfer)
                for stage in there:
                    own[stage].pop(0)
                moving = True
    assert works == own == [[] for _ in stages]


@pytest.mark.parametrize(("times", "micro_batches", "exchange", "pattern"), CASES)
def test_what_a_pass_needs_has_begun_before_it(times, micro_batches, exchange, pattern):
    """Without a look at other stages: of its own transfers, in their order, as far as its passes before have made
    what it gives.
    """
    schedule = SpreadSchedule(times, micro_batches, exchange, pattern, slack=exchange.hand)
    for stage, works in enumerate(schedule.orders):
        own, given, begun = [each for each in schedule.transfers() if schedule.takes_part(stage, each)], set(), set()
        for work in works:
            while own and (not schedule.gives(stage, own[0]) or own[0] in given):
                begun.add(own.pop(0))
            assert begun.issuperset(_needed(schedule, work))
            given.update(_made(schedule, work))


def test_even_stages_never_wait_between_fill_and_drain():
    """A step grows by one period with each micro-batch; it holds two or three micro-batches more than plain 1F1B."""
    ends = [max(done.end for done in fastest_schedule(EVEN, count, Exchange()).play()) for count in (20, 40)]
    assert ends[1] - ends[0] == pytest.approx(20 * 3.6)
    schedule = fastest_schedule(EVEN, 20, Exchange())
    assert [schedule.alive(stage) - (4 - stage) for stage in range(4)] in ([2] * 4, [3] * 4)


def test_links_slower_than_a_slices_passes_do_not_cost_a_round_at_every_stage():
    exchange = Exchange(hand=0.06, hidden=0.06, statistics=0.005)
    times = [StageTimes(1.0, 2.0, 0.03, 0.06, index == 7) for index in range(8)]
    without = min(
        (SpreadSchedule(times, 32, exchange, pattern) for pattern in PATTERNS), key=lambda found: found.alive(0)
    )
    found = fastest_schedule(times, 32, exchange)
    assert without.alive(0) > 14 > 12 >= found.alive(0)
    assert max(done.end for done in found.play()) < max(done.end for done in without.play())


def test_the_same_orders_in_slower_stages():
    schedule = fastest_schedule(EVEN, 6, Exchange())
    slower = schedule.with_times([StageTimes(2.0, 4.0, 0.4, 0.8, own.num_heads) for own in EVEN], schedule.exchange)
    assert slower.orders == schedule.orders
    assert max(done.end for done in slower.play()) == pytest.approx(2 * max(done.end for done in schedule.play()))

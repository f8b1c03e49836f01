"""Simulates the 1F1B schedule of a pipeline: when each stage runs the passes of each micro-batch.

    stage 0   F0 F1 F2 .. .. B0 F3 B1 F4 B2 ..        F: forward, B: backward, of the micro-batch with that number
    stage 1      F0 F1 .. B0 F2 B1 F3 B2 ..           a stage has at most P - stage micro-batches in flight
    stage 2         F0 B0 F1 B1 F2 B2 ..

Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2; deepspeed/runtime/pipe/schedule.py, TrainSchedule.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TimedPass:
    """One pass of one micro-batch through one stage, from time `start` to time `end`."""

    stage: int
    forward: bool
    micro_batch: int
    start: float
    end: float


def pass_order(stage: int, num_stages: int, num_micro_batches: int) -> list[tuple[bool, int]]:
    """Returns a stage's passes in their order, as (is forward, micro-batch)."""
    num_in_flight = min(num_stages - stage, num_micro_batches)
    passes = [(True, index) for index in range(num_in_flight)]
    for index in range(num_micro_batches):
        passes.append((False, index))
        if index + num_in_flight < num_micro_batches:
            passes.append((True, index + num_in_flight))
    return passes


def simulate(
    forward: list[float], backward: list[float], num_micro_batches: int, transfer_time: float = 0.0
) -> list[TimedPass]:
    """Returns the passes of all stages in one step, with their times.

    Args:
        forward, backward: time of one micro-batch in each stage.
        transfer_time: time of sending one micro-batch to the next stage, or its gradient to the previous stage.
            Stages compute during transfers.
    """
    num_stages = len(forward)
    waiting = [pass_order(stage, num_stages, num_micro_batches) for stage in range(num_stages)]
    ends: dict[tuple[int, bool, int], float] = {}
    free_at, timed_passes = [0.0] * num_stages, []
    while any(waiting):
        for stage, passes in enumerate(waiting):
            while passes:
                is_forward, index = passes[0]
                source = stage - 1 if is_forward else stage + 1
                source_end = ends.get((source, is_forward, index)) if 0 <= source < num_stages else -transfer_time
                if source_end is None:
                    break
                start = max(free_at[stage], source_end + transfer_time)
                free_at[stage] = start + (forward if is_forward else backward)[stage]
                ends[stage, is_forward, index] = free_at[stage]
                timed_passes.append(TimedPass(stage, is_forward, index, start, free_at[stage]))
                passes.pop(0)
    return timed_passes

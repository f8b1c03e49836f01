"""The 1F1B schedule of a pipeline, played: which stage works on which micro-batch when.

    stage 0   F0 F1 F2 .. .. B0 F3 B1 F4 B2 ..        F: forward, B: backward, of the micro-batch with that number
    stage 1      F0 F1 .. B0 F2 B1 F3 B2 ..           a stage has at most P - stage micro-batches between F and B
    stage 2         F0 B0 F1 B1 F2 B2 ..

Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2; deepspeed/runtime/pipe/schedule.py, TrainSchedule.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """One pass of one micro-batch through one stage, from `start` to `end`."""

    stage: int
    forward: bool
    micro_batch: int
    start: float
    end: float


def order(stage: int, num_stages: int, micro_batches: int) -> list[tuple[bool, int]]:
    """(forward, micro-batch) of a stage's passes, first to last."""
    ahead = min(num_stages - stage, micro_batches)
    passes = [(True, index) for index in range(ahead)]
    for index in range(micro_batches):
        passes.append((False, index))
        if index + ahead < micro_batches:
            passes.append((True, index + ahead))
    return passes


def play(forward: list[float], backward: list[float], micro_batches: int, link: float = 0.0) -> list[Work]:
    """The passes of all stages in one step.

    Args:
        forward, backward: time of one micro-batch in each stage.
        link: time of handing one micro-batch to the next stage, or its gradient back, during which the stages may work.
    """
    num_stages = len(forward)
    waiting = [order(stage, num_stages, micro_batches) for stage in range(num_stages)]
    done: dict[tuple[int, bool, int], float] = {}
    free, played = [0.0] * num_stages, []
    while any(waiting):
        for stage, passes in enumerate(waiting):
            while passes:
                is_forward, index = passes[0]
                source = stage - 1 if is_forward else stage + 1
                arrival = done.get((source, is_forward, index)) if 0 <= source < num_stages else -link
                if arrival is None:
                    break
                start = max(free[stage], arrival + link)
                free[stage] = start + (forward if is_forward else backward)[stage]
                done[stage, is_forward, index] = free[stage]
                played.append(Work(stage, is_forward, index, start, free[stage]))
                passes.pop(0)
    return played

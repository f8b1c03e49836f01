"""Exposed communication: time in which a transfer is under way and nothing computes, read from a profiler's trace."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from megamtp.engines.head_phase import HEAD_PHASE_RANGE

TRANSFER_KERNELS = ("hold", "nccl")
BEGINNING_KERNEL = "mark"  # an emulated transfer lasts from this to the end of its hold, whatever runs in between
Interval = tuple[float, float]


@dataclass(frozen=True)
class Exposure:
    """Milliseconds of a part of a step: in all, with a transfer, with a transfer but no computation, and with neither."""

    total: float
    transferring: float
    exposed: float
    idle: float

    @property
    def share(self) -> float:
        return self.exposed / self.total


def exposures(step: Callable[[], object]) -> dict[str, Exposure]:
    """Of one profiled step: "step", and "heads" (the head phase, from its first kernel to its last)."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    events = profiled.profiler.kineto_results.events()
    on_device = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    # Ranges that the program named also appear on the device, as long as the kernels launched inside them.
    ranges = [_interval(event) for event in on_device if event.name() == HEAD_PHASE_RANGE]
    kernels = [event for event in on_device if event.name() != HEAD_PHASE_RANGE and event.duration_ns() > 0]
    communicating = {e.device_resource_id() for e in kernels if any(name in e.name() for name in TRANSFER_KERNELS)}
    transfers = _transfers([event for event in kernels if event.device_resource_id() in communicating])
    computing = _union([_interval(event) for event in kernels if event.device_resource_id() not in communicating])
    whole = (computing[0][0], max(computing[-1][1], transfers[-1][1])) if transfers else (computing[0][0], computing[-1][1])
    found = {"step": _exposure(whole, transfers, computing)}
    if ranges:
        heads = (min(start for start, _ in ranges), max(end for _, end in ranges))
        found["heads"] = _exposure(heads, transfers, computing)
    return found


def _transfers(events: list) -> list[Interval]:
    found, beginning = [], None
    for event in sorted(events, key=lambda event: event.start_ns()):
        start, end = _interval(event)
        if event.name() == BEGINNING_KERNEL:
            beginning = start
        found.append((start if beginning is None else beginning, end))
        if "hold" in event.name():
            beginning = None
    return _union(found)


def _interval(event) -> Interval:
    return event.start_ns() / 1e6, (event.start_ns() + event.duration_ns()) / 1e6


def _union(intervals: list[Interval]) -> list[Interval]:
    """Sorted, disjoint intervals that cover the same time."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(intervals: list[Interval], window: Interval) -> float:
    return sum(max(0.0, min(end, window[1]) - max(start, window[0])) for start, end in intervals)


def _exposure(window: Interval, transfers: list[Interval], computing: list[Interval]) -> Exposure:
    total, busy = window[1] - window[0], _length(_union([*transfers, *computing]), window)
    return Exposure(total, _length(transfers, window), busy - _length(computing, window), total - busy)

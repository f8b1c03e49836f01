"""Exposed communication: time in which a transfer is under way and nothing computes, read from a profiler's trace."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from megamtp.engines.deepspeed.head_hooks import HEADS_PROFILER_RANGE

# An emulated transfer lasts from the kernel that notes its beginning to the end of its hold, whatever runs in between.
BEGIN, HOLD, REAL_TRANSFER = "mark", "hold", "nccl"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Kernel:
    """Something that ran on a stream of the device, or the range of the head phase; milliseconds."""

    name: str
    stream: int
    start: float
    end: float


LONG = 0.5  # milliseconds of an exposed transfer that nothing could hide, as at the two ends of a step


@dataclass(frozen=True)
class Exposure:
    """Milliseconds of a part of a step: in all; with computation; with a transfer; with a transfer but no computation;
    of this in pieces of at least LONG, and while a transfer's kernel copies or sums, as the emulated cluster's do with
    the whole card; and with neither.
    """

    total: float
    computing: float
    transferring: float
    exposed: float
    exposed_long: float
    exposed_moving: float
    idle: float

    @property
    def share(self) -> float:
        return self.exposed / self.total


@dataclass(frozen=True)
class Trace:
    """A step on the device: when it computed, when a transfer was under way, and when its parts began and ended.

    `parts` are "step" and, if the program named it, "heads": the head phase of each micro-batch from its first kernel
    to its last; and "trunk": the rest.

    Attributes:
        moving: when kernels of transfers copied or summed, other than real collectives' own.
    """

    computing: list[Interval]
    transfers: list[Interval]
    moving: list[Interval]
    parts: dict[str, list[Interval]]

    @property
    def exposed(self) -> list[Interval]:
        return subtract(self.transfers, self.computing)

    def exposures(self) -> dict[str, dict[str, float]]:
        """Of every part, as it is written to JSON."""
        return {part: asdict(self.exposure(part)) for part in self.parts}

    def exposure(self, part: str) -> Exposure:
        windows = self.parts[part]
        total, computing = _length(windows, windows), _length(self.computing, windows)
        exposed = _within(self.exposed, windows)
        waiting, long = (sum(end - start for start, end in exposed if end - start >= least) for least in (0.0, LONG))
        moving = _length(self.moving, exposed)
        transferring = _length(self.transfers, windows)
        return Exposure(total, computing, transferring, waiting, long, moving, total - computing - waiting)


def record(step: Callable[[], object]) -> Trace:
    """Runs one step under the profiler. Ranges that the program named lie on the device as long as the kernels
    started in them.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return read(
        [
            Kernel(
                event.name(),
                event.device_resource_id(),
                event.start_ns() / 1e6,
                (event.start_ns() + event.duration_ns()) / 1e6,
            )
            for event in profiled.profiler.kineto_results.events()
            if event.device_type() == torch.autograd.DeviceType.CUDA
            and (event.name() == HEADS_PROFILER_RANGE or not event.is_user_annotation())
        ]
    )


def read(events: list[Kernel]) -> Trace:
    """NCCL's kernels communicate, on whatever stream they are; of an emulated cluster, all that is on its transfers'
    streams.
    """
    heads = [event for event in events if event.name == HEADS_PROFILER_RANGE]
    kernels = [event for event in events if event.name != HEADS_PROFILER_RANGE and event.end > event.start]
    emulated = {kernel.stream for kernel in kernels if kernel.name == HOLD}
    communication: list[Kernel] = []
    others: list[Kernel] = []
    for kernel in kernels:
        communicates = kernel.stream in emulated or kernel.name.startswith(REAL_TRANSFER)
        (communication if communicates else others).append(kernel)
    computing = union([(kernel.start, kernel.end) for kernel in others])
    transfers = _transfers(communication)
    moving = union(
        [
            (kernel.start, kernel.end)
            for kernel in communication
            if kernel.name not in (BEGIN, HOLD) and not kernel.name.startswith(REAL_TRANSFER)
        ]
    )
    everything = [*computing, *transfers]
    parts = {"step": [(min(start for start, _ in everything), max(end for _, end in everything))]}
    if heads:
        parts["heads"] = union([(event.start, event.end) for event in heads])
        parts["trunk"] = subtract(parts["step"], parts["heads"])
    return Trace(computing, transfers, moving, parts)


def union(intervals: list[Interval]) -> list[Interval]:
    """Sorted, disjoint intervals that cover the same time."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def subtract(intervals: list[Interval], covered: list[Interval]) -> list[Interval]:
    """The parts of `intervals` outside `covered`; both, and the result, as `union` returns them."""
    left, first = [], 0
    for start, end in intervals:
        while first < len(covered) and covered[first][1] <= start:
            first += 1
        for cover_start, cover_end in covered[first:]:
            if cover_start >= end:
                break
            if cover_start > start:
                left.append((start, cover_start))
            start = max(start, cover_end)
        if start < end:
            left.append((start, end))
    return left


def _transfers(kernels: list[Kernel]) -> list[Interval]:
    found: list[Interval] = []
    beginnings: dict[int, float] = {}  # by stream
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if kernel.name == BEGIN:
            beginnings[kernel.stream] = kernel.start
        found.append((beginnings.get(kernel.stream, kernel.start), kernel.end))
        if kernel.name == HOLD:
            beginnings.pop(kernel.stream, None)
    return union(found)


def _within(intervals: list[Interval], windows: list[Interval]) -> list[Interval]:
    """What of `intervals` lies in `windows`."""
    return [
        (max(start, first), min(end, last))
        for first, last in windows
        for start, end in intervals
        if start < last and end > first
    ]


def _length(intervals: list[Interval], windows: list[Interval]) -> float:
    return sum(end - start for start, end in _within(intervals, windows))

"""Reads exposed communication from a profiler's trace: the time with a transfer in flight and no computation."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from megamtp.engines.deepspeed.head_hooks import HEADS_PROFILER_RANGE

# An emulated transfer starts with the kernel "mark" and ends with the kernel "hold". Other kernels may run in between.
BEGIN, HOLD, REAL_TRANSFER = "mark", "hold", "nccl"
# An exposed piece of this length is a transfer that nothing can overlap, as at the start and the end of a step.
LONG_MILLISECONDS = 0.5
Interval = tuple[float, float]


@dataclass(frozen=True)
class Kernel:
    """A kernel or copy on a stream of the device, or the range of the head phase. Times are in milliseconds."""

    name: str
    stream: int
    start: float
    end: float


@dataclass(frozen=True)
class Exposure:
    """Milliseconds of a part of a step.

    Attributes:
        computing: with computation.
        transferring: with a transfer in flight.
        exposed: with a transfer in flight and no computation.
        exposed_long: the part of `exposed` in pieces of at least LONG_MILLISECONDS.
        exposed_moving: the part of `exposed` in which a kernel of an emulated transfer copies or sums. These kernels
            use the whole GPU. Tables call it "exposed while copying"; the name is the key in result files.
        idle: with neither computation nor transfer.
    """

    total: float
    computing: float
    transferring: float
    exposed: float
    exposed_long: float
    exposed_moving: float
    idle: float

    @property
    def exposed_share(self) -> float:
        return self.exposed / self.total


@dataclass(frozen=True)
class Trace:
    """The intervals of one step on the device, in milliseconds.

    Attributes:
        computing: intervals with computation.
        transfers: intervals with a transfer in flight.
        copying: intervals in which kernels of emulated transfers copied or summed.
        parts: the intervals of "step" and, if the program marked the head phase, of "heads" (the head phase of each
            micro-batch, from its first kernel to its last) and "trunk" (the rest of the step).
    """

    computing: list[Interval]
    transfers: list[Interval]
    copying: list[Interval]
    parts: dict[str, list[Interval]]

    @property
    def exposed(self) -> list[Interval]:
        return subtract(self.transfers, self.computing)

    def exposures(self) -> dict[str, dict[str, float]]:
        """Returns the exposure of every part, as it is written to JSON."""
        return {part: asdict(self.exposure(part)) for part in self.parts}

    def exposure(self, part: str) -> Exposure:
        spans = self.parts[part]
        total, computing = _length(spans, spans), _length(self.computing, spans)
        exposed_intervals = _within(self.exposed, spans)
        exposed, long = (
            sum(end - start for start, end in exposed_intervals if end - start >= least)
            for least in (0.0, LONG_MILLISECONDS)
        )
        copying = _length(self.copying, exposed_intervals)
        transferring = _length(self.transfers, spans)
        return Exposure(total, computing, transferring, exposed, long, copying, total - computing - exposed)


def record(step: Callable[[], object]) -> Trace:
    """Runs one step under the profiler and returns its trace.

    On the device, the range of the head phase covers the kernels that were launched in it.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return trace_of(
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


def trace_of(events: list[Kernel]) -> Trace:
    """Returns the trace of one step: its kernels, sorted into computation and communication.

    NCCL's kernels on any stream are communication. In an emulated cluster, so is every kernel on a transfer's stream.
    """
    head_ranges = [event for event in events if event.name == HEADS_PROFILER_RANGE]
    kernels = [event for event in events if event.name != HEADS_PROFILER_RANGE and event.end > event.start]
    emulated_streams = {kernel.stream for kernel in kernels if kernel.name == HOLD}
    communication: list[Kernel] = []
    others: list[Kernel] = []
    for kernel in kernels:
        communicates = kernel.stream in emulated_streams or kernel.name.startswith(REAL_TRANSFER)
        (communication if communicates else others).append(kernel)
    computing = union([(kernel.start, kernel.end) for kernel in others])
    transfers = _transfers(communication)
    copying = union(
        [
            (kernel.start, kernel.end)
            for kernel in communication
            if kernel.name not in (BEGIN, HOLD) and not kernel.name.startswith(REAL_TRANSFER)
        ]
    )
    busy = [*computing, *transfers]
    parts = {"step": [(min(start for start, _ in busy), max(end for _, end in busy))]}
    if head_ranges:
        parts["heads"] = union([(event.start, event.end) for event in head_ranges])
        parts["trunk"] = subtract(parts["step"], parts["heads"])
    return Trace(computing, transfers, copying, parts)


def union(intervals: list[Interval]) -> list[Interval]:
    """Returns sorted, disjoint intervals that cover the same time."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def subtract(intervals: list[Interval], covered: list[Interval]) -> list[Interval]:
    """Returns the parts of `intervals` outside `covered`. All three are sorted and disjoint, as `union` returns."""
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
    transfers: list[Interval] = []
    starts: dict[int, float] = {}  # by stream
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if kernel.name == BEGIN:
            starts[kernel.stream] = kernel.start
        transfers.append((starts.get(kernel.stream, kernel.start), kernel.end))
        if kernel.name == HOLD:
            starts.pop(kernel.stream, None)
    return union(transfers)


def _within(intervals: list[Interval], spans: list[Interval]) -> list[Interval]:
    """Returns the parts of `intervals` inside `spans`."""
    return [
        (max(start, first), min(end, last))
        for first, last in spans
        for start, end in intervals
        if start < last and end > first
    ]


def _length(intervals: list[Interval], spans: list[Interval]) -> float:
    return sum(end - start for start, end in _within(intervals, spans))

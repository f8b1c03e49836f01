"""Exposed communication of invented kernels with known times in milliseconds."""

import pytest
from benchmarks.exposure import Exposure, Kernel, subtract, trace_of, union

from megamtp.engines.deepspeed.head_hooks import HEADS_PROFILER_RANGE

COMPUTE, GATHER, SCATTER = 7, 20, 21


def computing(start: float, end: float, stream: int = COMPUTE) -> Kernel:
    return Kernel("sm90_gemm", stream, start, end)


def emulated(start: float, end: float, stream: int = GATHER, copy_end: float | None = None) -> list[Kernel]:
    """Returns the kernels of an emulated transfer: mark, copy, and a hold that may start late."""
    copy_end = start + 1 if copy_end is None else copy_end
    return [
        Kernel("mark", stream, start, start + 0.1),
        Kernel("Memcpy DtoD", stream, start + 0.2, copy_end),
        Kernel("hold", stream, copy_end + 0.3, end),
    ]


@pytest.mark.parametrize(
    ("intervals", "covered", "remaining"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([], [(0, 10)], []),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 3), (5, 7)], [(0, 2), (3, 5), (7, 10)]),
        ([(2, 4), (6, 8)], [(0, 3), (7, 9)], [(3, 4), (6, 7)]),
        ([(0, 2), (3, 5)], [(1, 4)], [(0, 1), (4, 5)]),
        ([(5, 6)], [(0, 1), (2, 5), (6, 7)], [(5, 6)]),
    ],
)
def test_subtraction(intervals, covered, remaining):
    assert subtract(intervals, covered) == remaining


def test_union_joins_intervals_that_overlap_or_touch():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4), (0, 1)]) == [(0, 4), (5, 6)]


def test_hidden_exposed_and_idle_times():
    """With computation in 0-10 and 14-20 and a transfer in 4-12, 10-12 is exposed and 12-14 idle."""
    trace = trace_of([computing(0, 6), computing(6, 10), computing(14, 20), *emulated(4, 12)])
    assert trace.computing == [(0, 10), (14, 20)]
    assert trace.transfers == [(4, 12)]
    assert trace.exposed == [(10, 12)]
    assert trace.parts == {"step": [(0, 20)]}
    assert trace.exposure("step") == Exposure(
        total=20, computing=16, transferring=8, exposed=2, exposed_long=2, exposed_moving=0, idle=2
    )
    assert trace.exposure("step").exposed_share == 0.1


def test_a_part_counts_only_intervals_inside_it():
    """The head phase is 8-18 of the same step. On the device it has one range for each stream."""
    ranges = [Kernel(HEADS_PROFILER_RANGE, COMPUTE, 9, 18), Kernel(HEADS_PROFILER_RANGE, GATHER, 8, 12)]
    trace = trace_of([computing(0, 10), computing(14, 20), *emulated(4, 12), *ranges])
    assert trace.parts == {"step": [(0, 20)], "heads": [(8, 18)], "trunk": [(0, 8), (18, 20)]}
    assert trace.exposure("heads") == Exposure(
        total=10, computing=6, transferring=4, exposed=2, exposed_long=2, exposed_moving=0, idle=2
    )
    assert trace.exposure("trunk") == Exposure(
        total=10, computing=10, transferring=4, exposed=0, exposed_long=0, exposed_moving=0, idle=0
    )
    assert trace.exposures()["heads"]["exposed"] == 2


def test_every_micro_batch_has_a_head_phase():
    """Of the transfer 7-17, 10-14 is exposed, and a piece in the second head phase that is too short to be long."""
    ranges = [Kernel(HEADS_PROFILER_RANGE, COMPUTE, start, start + 2) for start in (6, 16)]
    trace = trace_of([computing(0, 10), computing(14, 16.6), computing(17, 20), *emulated(7, 17), *ranges])
    assert trace.parts["heads"] == [(6, 8), (16, 18)]
    assert trace.parts["trunk"] == [(0, 6), (8, 16), (18, 20)]
    heads, trunk = trace.exposure("heads"), trace.exposure("trunk")
    assert (heads.transferring, heads.exposed, heads.exposed_long) == (2, pytest.approx(0.4), 0)
    assert (trunk.transferring, trunk.exposed, trunk.exposed_long) == (8, 4, 4)


def test_a_transfer_ends_with_its_own_hold():
    """With two transfers on one stream, nothing is in flight between the first hold and the second mark."""
    trace = trace_of([computing(0, 1), *emulated(2, 8, copy_end=5), *emulated(10, 13), computing(20, 21)])
    assert trace.transfers == [(2, 8), (10, 13)]
    assert trace.exposure("step") == Exposure(
        total=21,
        computing=2,
        transferring=9,
        exposed=9,
        exposed_long=9,
        exposed_moving=pytest.approx(2.8 + 0.8),
        idle=10,
    )


def test_each_stream_has_its_own_transfers():
    """The second transfer starts and ends during the first, on another stream."""
    first, second = emulated(0, 10, copy_end=6), emulated(2, 4, SCATTER)
    trace = trace_of([computing(11, 12), *first, *second])
    assert trace.transfers == [(0, 10)]
    assert trace_of([computing(11, 12), *second]).transfers == [(2, 4)]


def test_kernels_on_other_streams_are_computation():
    """This includes a second computing stream, and a kernel whose name contains that of a transfer kernel."""
    trace = trace_of(
        [computing(0, 2), Kernel("threshold_backward", COMPUTE, 2, 3), computing(3, 6, stream=8), *emulated(0, 8)]
    )
    assert trace.computing == [(0, 6)]
    assert trace.exposure("step") == Exposure(
        total=8, computing=6, transferring=8, exposed=2, exposed_long=2, exposed_moving=0, idle=0
    )


def test_real_collectives_are_transfers_of_their_own():
    trace = trace_of([computing(0, 4), Kernel("ncclDevKernel_AllGather_RING_LL", GATHER, 3, 6)])
    assert trace.transfers == [(3, 6)]
    assert trace.exposure("step") == Exposure(
        total=6, computing=4, transferring=3, exposed=2, exposed_long=2, exposed_moving=0, idle=0
    )


def test_a_real_transfer_on_the_computing_stream_is_not_computation():
    trace = trace_of(
        [computing(0, 4), Kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)", COMPUTE, 4, 6), computing(6, 8)]
    )
    assert trace.computing == [(0, 4), (6, 8)]
    assert trace.exposed == [(4, 6)]

"""Finds the device that a benchmark measures (the GPU, or the CPU if a smoke run has no GPU) and reads its clock."""

import time
from collections.abc import Callable
from typing import Any

import torch

RecordedTime = torch.cuda.Event | float


def find_device() -> torch.device:
    """Returns the current GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Waits for all work that was queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def record_time(device: torch.device) -> RecordedTime:
    """Records the time at which the device reaches this point of the current stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: RecordedTime, end: RecordedTime) -> float:
    """Returns the seconds between two times recorded on the same device, which must have reached `end`."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


def measure_milliseconds(run: Callable[[], object], **timing: Any) -> list[float]:
    """Returns the times that Triton's do_bench measures with the arguments `timing`; on a CPU, the time of one run."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(run, return_mode="all", **timing)
    start = time.perf_counter()
    run()
    return [1e3 * (time.perf_counter() - start)]

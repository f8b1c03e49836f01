"""The device that a benchmark measures, and its clock: the GPU, or the CPU where a smoke run finds no GPU."""

import time

import torch

RecordedTime = torch.cuda.Event | float


def find_device() -> torch.device:
    """The current GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Waits for all work that was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def record_time(device: torch.device) -> RecordedTime:
    """The time at which the device comes to this place of the current stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: RecordedTime, end: RecordedTime) -> float:
    """Both of one device, which has come to `end`."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float) and isinstance(end, float)
    return end - start

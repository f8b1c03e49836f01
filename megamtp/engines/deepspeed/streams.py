"""The CUDA streams of grouped communication.

Tests: tests/gpu/test_emulated.py.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Streams:
    """The streams of one device. On a CPU they are None, and every operation is finished when it returns.

    Attributes:
        compute: the stream that the model runs on.
        gather: the stream of all-gathers.
        reduce: the stream of reduce-scatters.
    """

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.compute = torch.cuda.current_stream(device) if self.on_gpu else None
        self.gather = torch.cuda.Stream(device) if self.on_gpu else None
        self.reduce = torch.cuda.Stream(device) if self.on_gpu else None

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Switches to `stream` and back to the compute stream, without the cost of querying the current stream."""
        if stream is not None:
            torch.cuda.set_stream(stream)
        try:
            yield
        finally:
            if self.compute is not None:
                torch.cuda.set_stream(self.compute)

    def record(self, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """Records an event in a stream."""
        return None if stream is None else stream.record_event()

    def wait_event(self, event: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> None:
        """Makes a stream wait for an event, without blocking the CPU."""
        if event is not None and stream is not None:
            stream.wait_event(event)

    def wait_for_compute(self, stream: torch.cuda.Stream | None) -> None:
        """Makes a stream wait for all work that is already queued on the compute stream."""
        if stream is not None and self.compute is not None:
            stream.wait_stream(self.compute)

    def mark_used_by_compute(self, tensor: Tensor) -> None:
        """Keeps the memory of another stream's tensor from being reused before the compute stream is done with it."""
        if self.compute is not None:
            tensor.record_stream(self.compute)

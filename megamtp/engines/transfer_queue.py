"""Starts a rank's transfers with other pipeline stages in the order of a schedule.

Transfers run concurrently with computation, which waits only for data that it needs. All ranks start their transfers in
the same order. On a GPU all transfers run on one stream, one after the other, for two reasons: NCCL may deadlock if
ranks start transfers in different orders, even in different groups and streams
(https://github.com/NVIDIA/nccl/issues/783), and a transfer that waits for its peers occupies multiprocessors.

Tests: tests/distributed/test_spread_pipeline.py.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.planning.spread_schedule import Transfer


class TransferQueue:
    """This rank's transfers of one step. Starts them in order, each as soon as this rank has the data that it sends.

    Args:
        stream: the stream of all transfers. None on a CPU.
        transfers: the transfers in which this rank takes part, in order.
        sends: sends(transfer) returns whether this rank sends data in the transfer.
        start: start(transfer, data) starts the transfer and returns (received data, works to wait for). `data` is None
            if this rank only receives.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream | None,
        transfers: list[Transfer],
        sends: Callable[[Transfer], bool],
        start: Callable[[Transfer, list[Tensor] | None], tuple[list[Tensor], list[dist.Work]]],
    ):
        self.stream, self.transfers, self.sends, self._start = stream, transfers, sends, start
        self.to_send: dict[Transfer, tuple[list[Tensor], torch.cuda.Event | None]] = {}
        self.received: dict[Transfer, tuple[list[Tensor], list[dist.Work], torch.cuda.Event | None]] = {}
        self.in_flight: list[tuple[list[Tensor], list[dist.Work]]] = []  # keeps the memory of data being sent
        self.num_started = 0

    def put(self, transfer: Transfer, tensors: list[Tensor]) -> None:
        """Adds the data to send in a transfer, as computed on the current stream."""
        self.to_send[transfer] = tensors, torch.cuda.current_stream().record_event() if self.stream else None
        self._start_ready_transfers()

    def get(self, transfer: Transfer) -> list[Tensor]:
        """Returns the received data of a transfer, ready for use on the current stream.

        Raises:
            KeyError: the transfer has not started, because data of an earlier transfer are missing.
        """
        self._start_ready_transfers()
        tensors, works, end = self.received.pop(transfer)
        if end:
            torch.cuda.current_stream().wait_event(end)
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream())
        else:
            _wait(works)
        return tensors

    def finish(self) -> None:
        """Waits until all data are sent: the current stream on a GPU, this thread on a CPU."""
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            for _, works in self.in_flight:
                _wait(works)
        self.in_flight.clear()

    def _start_ready_transfers(self) -> None:
        if self.stream and self.num_started == 0:
            self.stream.wait_stream(torch.cuda.current_stream())  # earlier collectives of the ranks run first
        while self.num_started < len(self.transfers):
            transfer = self.transfers[self.num_started]
            if self.sends(transfer) and transfer not in self.to_send:
                return
            self.num_started += 1
            tensors, computed_event = self.to_send.pop(transfer, (None, None))
            with torch.cuda.stream(self.stream) if self.stream else nullcontext():
                if computed_event and self.stream:
                    self.stream.wait_event(computed_event)
                received, works = self._start(transfer, tensors)
                if self.stream:
                    _wait(works)  # blocks the stream, not this thread
                if received:
                    self.received[transfer] = received, works, self.stream.record_event() if self.stream else None
            self.in_flight = [(sent, works) for sent, works in self.in_flight if not _are_completed(works)]
            if tensors:
                self.in_flight.append((tensors, works))


def _are_completed(works: list[dist.Work]) -> bool:
    return all(work.is_completed() for work in works)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()

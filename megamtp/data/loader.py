"""Which windows each rank reads at each step: the order of windows depends neither on the ranks nor on where a run
resumes.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megamtp.data.windows import Window, Windows
from megamtp.errors import InputError
from megamtp.targets import IGNORED

STEPS_AHEAD = 2  # that are read while the engine is at work


@dataclass(frozen=True)
class Batch:
    """A micro-batch: int64 inputs [B, T] and targets [n, B, T], some of which may be IGNORED.

    documents: int64 [B, T], rising in each row: attention stays among the positions of equal ones. None: it does not
    stop.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), documents)


class WindowSequence(Protocol):
    """An endless sequence of windows: one corpus in shuffled epochs (Windows), or several (Blend)."""

    @property
    def targets_can_be_ignored(self) -> bool: ...

    def at(self, places: np.ndarray) -> list[Window]: ...


class TrainLoader:
    """The micro-batches of one rank.

    Steps take windows of the endless sequence in a row, G each; step `first_step` begins at window `first_window`. Of a
    global batch, micro-batch a of rank r (of D, with B windows each) takes B windows from place (a * D + r) * B. A
    thread reads the steps that come next; `close` ends it.

    Raises:
        InputError: the global batch G is not a multiple of D * B.
    """

    def __init__(
        self,
        windows: WindowSequence,
        global_batch_windows: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        first_step: int = 0,
        first_window: int = 0,
    ):
        self.windows, self.global_batch_windows, self.micro_batch_size = windows, global_batch_windows, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self._window_of_step_0 = first_window - first_step * global_batch_windows
        if global_batch_windows % (micro_batch_size * world_size):
            raise InputError(
                f"a global batch of {global_batch_windows} windows is not a multiple of {micro_batch_size} windows x "
                f"{world_size} ranks; change train.global_batch_tokens, train.micro_batch_size or the number of ranks"
            )
        self.accumulation = global_batch_windows // (micro_batch_size * world_size)
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future] = {}

    def windows_before(self, step: int) -> int:
        """How many windows of the sequence the steps before `step` (from 0) have taken."""
        return self._window_of_step_0 + step * self.global_batch_windows

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of step `step` (from 0), which are ready if it follows the last one asked for.

        Raises:
            InputError: a record of this step is damaged.
        """
        self._read_ahead(step)
        return self._ahead.pop(step).result()

    def damage(self, step: int) -> str | None:
        """What is wrong with the records of step `step`, if anything is; waits until it is read."""
        self._read_ahead(step)
        error = self._ahead[step].exception()
        if error is not None and not isinstance(error, InputError):
            raise error
        return None if error is None else str(error)

    def _read_ahead(self, step: int) -> None:
        """Has the thread read this step and the next ones, and forget others."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamtp data")
        wanted = range(step, step + 1 + STEPS_AHEAD)
        for other in self._ahead.keys() - set(wanted):
            self._ahead.pop(other).cancel()
        for number in wanted:
            if number not in self._ahead:
                self._ahead[number] = self._reader.submit(self.read, number)

    def read(self, step: int) -> list[Batch]:
        """What `micro_batches` returns, read now and here."""
        first = self.windows_before(step) + self.rank * self.micro_batch_size
        starts = first + np.arange(self.accumulation) * self.world_size * self.micro_batch_size
        windows = self.windows.at((starts[:, None] + np.arange(self.micro_batch_size)).flatten())
        return [
            _stack(windows[first : first + self.micro_batch_size])
            for first in range(0, len(windows), self.micro_batch_size)
        ]

    def close(self) -> None:
        """Ends the thread when it has read the step it is at."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None
            self._ahead.clear()


def evaluation_batches(
    windows: Windows, micro_batch_size: int, rank: int, world_size: int, max_windows: int | None
) -> Iterator[Batch]:
    """The first `max_windows` windows (None: all), each on exactly one rank; every rank gets equally many batches.

    A rank without a window left gets one whose targets are all IGNORED: engines need all ranks in every call.
    """
    number = len(windows) if max_windows is None else min(max_windows, len(windows))
    for first in range(0, number, micro_batch_size * world_size):
        places = np.arange(micro_batch_size) + first + rank * micro_batch_size
        batch = _stack([windows[min(int(place), number - 1)] for place in places])
        batch.targets[:, torch.from_numpy(places >= number)] = IGNORED
        yield batch


def read_group(batches: Iterator[Batch], size: int) -> tuple[list[Batch], str | None]:
    """The next `size` batches, or those that are left, and what is wrong with a record that ends the group early, if
    one does.
    """
    group: list[Batch] = []
    try:
        group.extend(itertools.islice(batches, size))
    except InputError as error:
        return group, str(error)
    return group, None


def _stack(windows: list[Window]) -> Batch:
    inputs, targets, documents = zip(*windows, strict=True)
    return Batch(
        torch.stack(inputs), torch.stack(targets, dim=1), None if documents[0] is None else torch.stack(documents)
    )

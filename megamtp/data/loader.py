"""Loads each rank's micro-batches. The order of windows does not depend on the ranks or on where a run resumes."""

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

STEPS_AHEAD = 2  # a thread reads so many steps while the engine runs the current step


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        inputs: int64 [B, T].
        targets: int64 [n, B, T]; some may be IGNORED.
        documents: int64 [B, T], non-decreasing in each row. Attention is restricted to positions of the same document.
            None: attention is causal only.
        following: int64 [B, n - 1], the tokens after each window, or IGNORED. None: unknown, for heads that do not read
            tokens.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None
    following: Tensor | None = None

    @classmethod
    def from_tokens(cls, tokens: Tensor, sequence_length: int) -> "Batch":
        """Returns a micro-batch of windows of one document each, all of whose targets are known.

        Args:
            tokens: int64 [B, T + n]: the inputs of each window, and the n tokens after them.
            sequence_length: T.
        """
        inputs, targets = tokens[:, :sequence_length].contiguous(), tokens[:, 1:].unfold(1, sequence_length, 1)
        return cls(inputs, targets.permute(1, 0, 2), following=tokens[:, sequence_length:-1])

    def to(self, device: torch.device) -> "Batch":
        """Returns a copy on another device."""
        documents, following = (
            None if tensor is None else tensor.to(device) for tensor in (self.documents, self.following)
        )
        return Batch(self.inputs.to(device), self.targets.to(device), documents, following)


class WindowSequence(Protocol):
    """An endless sequence of windows: shuffled epochs of one corpus (Windows), or several corpora (Blend)."""

    @property
    def targets_can_be_ignored(self) -> bool: ...

    def windows_at(self, indices: np.ndarray) -> list[Window]: ...


class TrainLoader:
    """Loads the micro-batches of one rank.

    Each step reads the next `global_batch_windows` windows of the endless sequence; step `first_step` starts at window
    `first_window`. Micro-batch m of a rank reads `micro_batch_size` windows of the step, which start at window
    (m * world_size + rank) * micro_batch_size. A thread reads the next steps ahead until `close` is called.

    Raises:
        InputError: `global_batch_windows` is not a multiple of world_size * micro_batch_size.
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
        self.num_micro_batches = global_batch_windows // (micro_batch_size * world_size)
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future] = {}

    def first_window(self, step: int) -> int:
        """Returns the index of the first window of `step` (from 0) in the endless sequence."""
        return self._window_of_step_0 + step * self.global_batch_windows

    def micro_batches(self, step: int) -> list[Batch]:
        """Returns this rank's micro-batches of a step (from 0). They have been read ahead if steps are consecutive.

        Raises:
            InputError: a window of this step is damaged.
        """
        self._read_ahead(step)
        return self._ahead.pop(step).result()

    def read_error(self, step: int) -> str | None:
        """Waits until a step has been read. Returns the message of an InputError, or None."""
        self._read_ahead(step)
        error = self._ahead[step].exception()
        if error is not None and not isinstance(error, InputError):
            raise error
        return None if error is None else str(error)

    def _read_ahead(self, step: int) -> None:
        """Makes the thread read this step and the next steps, and drops all other steps."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamtp data")
        steps = range(step, step + 1 + STEPS_AHEAD)
        for other in self._ahead.keys() - set(steps):
            self._ahead.pop(other).cancel()
        for number in steps:
            if number not in self._ahead:
                self._ahead[number] = self._reader.submit(self.read, number)

    def read(self, step: int) -> list[Batch]:
        """Returns the same as `micro_batches`, read in the calling thread."""
        first = self.first_window(step) + self.rank * self.micro_batch_size
        starts = first + np.arange(self.num_micro_batches) * self.world_size * self.micro_batch_size
        windows = self.windows.windows_at((starts[:, None] + np.arange(self.micro_batch_size)).flatten())
        return [
            _stack(windows[first : first + self.micro_batch_size])
            for first in range(0, len(windows), self.micro_batch_size)
        ]

    def close(self) -> None:
        """Ends the thread after the step that it is reading."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None
            self._ahead.clear()


def evaluation_batches(
    windows: Windows, micro_batch_size: int, rank: int, world_size: int, max_windows: int | None
) -> Iterator[Batch]:
    """Yields the first `max_windows` windows (None: all), each on exactly one rank, in equally many batches per rank.

    Engines need all ranks in every call, so a rank that has no windows left gets windows whose targets are all IGNORED.
    """
    num_windows = len(windows) if max_windows is None else min(max_windows, len(windows))
    for first in range(0, num_windows, micro_batch_size * world_size):
        indices = np.arange(micro_batch_size) + first + rank * micro_batch_size
        batch = _stack([windows[min(int(index), num_windows - 1)] for index in indices])
        batch.targets[:, torch.from_numpy(indices >= num_windows)] = IGNORED
        yield batch


def read_group(batches: Iterator[Batch], size: int) -> tuple[list[Batch], str | None]:
    """Returns up to `size` batches, and the error message of a damaged window or None.

    There are fewer than `size` batches at the end and before a damaged window.
    """
    group: list[Batch] = []
    try:
        group.extend(itertools.islice(batches, size))
    except InputError as error:
        return group, str(error)
    return group, None


def _stack(windows: list[Window]) -> Batch:
    inputs, targets, documents, following = zip(*windows, strict=True)
    return Batch(
        torch.stack(inputs),
        torch.stack(targets, dim=1),
        None if documents[0] is None else torch.stack(documents),
        torch.stack(following),
    )

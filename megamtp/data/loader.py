"""Which windows a rank sees when: a function of (seed, step) alone, whatever the number of ranks and wherever a run resumes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megamtp.data.windows import IGNORED, Windows
from megamtp.errors import InputError


@dataclass(frozen=True)
class Batch:
    """A micro-batch: int64 inputs [B, T] and targets [n, B, T], some of which may be IGNORED."""

    inputs: Tensor
    targets: Tensor


class TrainLoader:
    """The micro-batches of one rank.

    The global batch of step s is windows s * G to (s + 1) * G of the endless sequence of shuffled epochs. Of it, micro-batch a of
    rank r (of D, with B windows each) takes B windows from place (a * D + r) * B.

    Raises:
        InputError: the global batch G is not a multiple of D * B.
    """

    def __init__(self, windows: Windows, global_batch_windows: int, micro_batch_size: int, rank: int, world_size: int):
        self.windows, self.global_batch_windows, self.micro_batch_size = windows, global_batch_windows, micro_batch_size
        self.rank, self.world_size = rank, world_size
        if global_batch_windows % (micro_batch_size * world_size):
            raise InputError(
                f"a global batch of {global_batch_windows} windows is not a multiple of {micro_batch_size} windows x {world_size} "
                "ranks; change train.global_batch_tokens, train.micro_batch_size or the number of ranks"
            )
        self.accumulation = global_batch_windows // (micro_batch_size * world_size)
        self._order = lru_cache(maxsize=2)(windows.shuffled)  # a batch may touch the end of one epoch and the start of the next

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of step `step` (from 0)."""
        first = step * self.global_batch_windows
        batches = []
        for index in range(self.accumulation):
            place = first + (index * self.world_size + self.rank) * self.micro_batch_size
            numbers = [self._window_at(place + offset) for offset in range(self.micro_batch_size)]
            batches.append(_stack([self.windows[number] for number in numbers]))
        return batches

    def _window_at(self, place: int) -> int:
        epoch, position = divmod(place, len(self.windows))
        return int(self._order(epoch)[position])


def evaluation_batches(
    windows: Windows, micro_batch_size: int, rank: int, world_size: int, max_windows: int | None
) -> Iterator[Batch]:
    """The first `max_windows` windows (None: all), each on exactly one rank; every rank gets equally many batches.

    A rank without a window left gets one whose targets are all IGNORED: engines need all ranks in every call.
    """
    number = len(windows) if max_windows is None else min(max_windows, len(windows))
    for first in range(0, number, micro_batch_size * world_size):
        places = np.arange(micro_batch_size) + first + rank * micro_batch_size
        pairs = [windows[min(int(place), number - 1)] for place in places]
        batch = _stack(pairs)
        batch.targets[:, torch.from_numpy(places >= number)] = IGNORED
        yield batch


def _stack(pairs: list[tuple[Tensor, Tensor]]) -> Batch:
    inputs, targets = zip(*pairs, strict=True)
    return Batch(torch.stack(inputs), torch.stack(targets, dim=1))

"""A token file -> training windows: T inputs and, for each of them, the n tokens that follow."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.shuffle import Shuffle
from megamtp.errors import InputError
from megamtp.targets import IGNORED

CHECKED_TOKENS = 1 << 20  # of either end of a corpus, before a run begins


class Window(NamedTuple):
    """int64 inputs [T] and targets [n, T]; targets[i - 1, t] is the token i positions after inputs[t], or IGNORED.

    documents: int64 [T], the number of the document of each input, from 0 in each window; None if attention may cross
    them.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None


class Windows:
    """Windows of T + n tokens that advance by T through all documents in a row.

    Their number and order do not depend on n, and every token after the first is head 1's target exactly once an epoch
    (but for a rest shorter than T). Only in the last windows may targets lie beyond the end: they are IGNORED.

    Args:
        sequence_length: T.
        num_future_tokens: n.
        seed, stream: of the order of epochs; `stream` tells corpora of one blend apart.
        vocab_size: tokens are below it.
        documents: "continue" crosses their boundaries as the paper does; "mask" ignores targets in another document
            than their input's; "isolate" tells documents apart besides, so that attention does not cross them either.

    Raises:
        InputError: the corpus has no window, or no token ids.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        sequence_length: int,
        num_future_tokens: int,
        seed: int,
        stream: int = 0,
        vocab_size: int = 2**63,
        documents: str = "continue",
    ):
        self.dataset, self.sequence_length, self.num_future_tokens = dataset, sequence_length, num_future_tokens
        self.seed, self.stream, self.vocab_size, self.documents = seed, stream, vocab_size, documents
        self._reach = 1 + np.stack(np.tril_indices(num_future_tokens))  # all (i, distance) with 1 <= distance <= i <= n
        self.number = (dataset.num_tokens - 1) // sequence_length
        if dataset.dtype.kind == "f":
            raise InputError(f"{dataset.name} holds {dataset.dtype.name}; expected token ids, which are whole numbers")
        if self.number < 1:
            raise InputError(
                f"{dataset.name} has {dataset.num_tokens} tokens; expected at least {sequence_length + 1} for windows "
                f"of train.sequence_length={sequence_length}: shorten them or add text"
            )

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Window:
        """Raises InputError: its tokens are outside the vocabulary, or the index contradicts itself there."""
        if not 0 <= index < self.number:
            raise IndexError(f"window {index} of {self.number}")
        length, start = self.sequence_length, index * self.sequence_length
        tokens = np.full(length + self.num_future_tokens, IGNORED, dtype=np.int64)
        found = self._read(start, start + len(tokens))
        tokens[: len(found)] = found
        window = torch.from_numpy(tokens)
        inputs, targets = window[:length], window[1:].unfold(0, length, 1)
        if self.documents == "continue":
            return Window(inputs, targets, None)
        boundaries = self.dataset.boundaries(start, start + len(found)) - start
        targets = targets.clone(memory_format=torch.contiguous_format)
        targets.numpy()[self._crossing(boundaries)] = IGNORED
        if self.documents == "mask":
            return Window(inputs, targets, None)
        begins = np.zeros(length, np.int64)
        begins[boundaries[boundaries < length]] = 1
        return Window(inputs, targets, torch.from_numpy(begins.cumsum()))

    def _crossing(self, boundaries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(i - 1, t) of all targets i positions after t that have a boundary between: those of the i positions
        before each.
        """
        ahead, before = self._reach
        heads = np.broadcast_to(ahead - 1, (len(boundaries), len(ahead)))
        places = boundaries[:, None] - before
        inside = (places >= 0) & (places < self.sequence_length)
        return heads[inside], places[inside]

    def at(self, places: np.ndarray) -> list[Window]:
        """The windows at these places of the endless sequence of shuffled epochs."""
        numbers = np.empty(len(places), np.int64)
        for epoch in np.unique(places // self.number):
            own = places // self.number == epoch
            numbers[own] = self.shuffled(int(epoch))(places[own] % self.number)
        return [self[number] for number in numbers.tolist()]

    @property
    def targets_can_be_ignored(self) -> bool:
        """Whether a window may lack targets, so that heads' counts of targets differ."""
        return (
            self.documents != "continue"
            or self.number * self.sequence_length + self.num_future_tokens > self.dataset.num_tokens
        )

    def shuffled(self, epoch: int) -> Shuffle:
        """The order of the windows in an epoch."""
        return Shuffle(self.number, self.seed, self.stream, epoch)

    def check_ends(self) -> None:
        """Reads the first and the last million tokens. Raises InputError: they are outside the vocabulary."""
        self._read(0, CHECKED_TOKENS)
        self._read(max(0, self.dataset.num_tokens - CHECKED_TOKENS), self.dataset.num_tokens)

    def check_first(self, max_windows: int | None, rank: int, world_size: int) -> None:
        """Reads this rank's share of the tokens of the first windows (None: all), as all ranks' evaluations will.

        Raises:
            InputError: see check_ends.
        """
        number = self.number if max_windows is None else min(max_windows, self.number)
        stop = min(number * self.sequence_length + self.num_future_tokens, self.dataset.num_tokens)
        for start in range(rank * CHECKED_TOKENS, stop, world_size * CHECKED_TOKENS):
            self._read(start, min(start + CHECKED_TOKENS, stop))
            if self.documents != "continue":
                self.dataset.boundaries(start, min(start + CHECKED_TOKENS, stop))

    def _read(self, start: int, stop: int) -> np.ndarray:
        tokens = self.dataset.tokens(start, stop)
        wrong = (tokens < 0) | (tokens >= self.vocab_size)
        if wrong.any():
            first = int(wrong.argmax())
            raise InputError(
                f"{self.dataset.name}.bin holds token {tokens[first]} in document "
                f"{self.dataset.document_at(start + first)}, model.vocab_size is {self.vocab_size}; expected ids from "
                "0 to below it: the file is damaged, or made with another tokenizer than the model's"
            )
        return tokens

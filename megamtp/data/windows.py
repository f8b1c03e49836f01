"""Cuts a token file into training windows: T inputs and, for each input, the n tokens that follow it."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.shuffle import Shuffle
from megamtp.errors import InputError
from megamtp.targets import IGNORED

CHECKED_TOKENS = 1 << 20  # checked at both ends of a corpus before training starts


class Window(NamedTuple):
    """One training sample.

    Attributes:
        inputs: int64 [T].
        targets: int64 [n, T]; targets[i - 1, t] is the token i positions after inputs[t], or IGNORED.
        documents: int64 [T], which document each input belongs to, numbered from 0 in each window. None if attention
            may cross document boundaries.
        following: int64 [n - 1], the tokens after the inputs, of whichever document; IGNORED beyond the corpus.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None
    following: Tensor


class Windows:
    """Windows of T + n tokens that advance by T tokens through the concatenated documents of a corpus.

    The number and the order of windows do not depend on n. In each epoch, every token after the first is a target of
    head 1 exactly once (except for a remainder of fewer than T tokens). Targets beyond the end of the corpus, which
    occur only in the last windows, are IGNORED.

    Args:
        sequence_length: T.
        num_future_tokens: n.
        seed, stream: the key of the shuffles. `stream` distinguishes the corpora of a blend.
        vocab_size: all tokens must be below it.
        documents: "continue" ignores document boundaries, as the paper does. "mask" ignores targets that lie in another
            document than their input. "isolate" also keeps attention inside documents.

    Raises:
        InputError: the corpus is shorter than one window, or it holds floating-point numbers.
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
        # all pairs (i, distance) with 1 <= distance <= i <= n
        self._heads_and_distances = 1 + np.stack(np.tril_indices(num_future_tokens))
        self.num_windows = (dataset.num_tokens - 1) // sequence_length
        if dataset.dtype.kind == "f":
            raise InputError(f"{dataset.name} holds {dataset.dtype.name}; expected token ids, which are whole numbers")
        if self.num_windows < 1:
            raise InputError(
                f"{dataset.name} has {dataset.num_tokens} tokens; expected at least {sequence_length + 1} for windows "
                f"of train.sequence_length={sequence_length}: shorten the windows or add text"
            )

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> Window:
        """Returns a window by its position in the corpus.

        Raises:
            InputError: a token is outside the vocabulary, or the .idx file is inconsistent there.
        """
        if not 0 <= index < self.num_windows:
            raise IndexError(f"window {index} of {self.num_windows}")
        length, start = self.sequence_length, index * self.sequence_length
        tokens = np.full(length + self.num_future_tokens, IGNORED, dtype=np.int64)
        available = self._read(start, start + len(tokens))
        tokens[: len(available)] = available
        window = torch.from_numpy(tokens)
        inputs, targets, following = window[:length], window[1:].unfold(0, length, 1), window[length:-1]
        if self.documents == "continue":
            return Window(inputs, targets, None, following)
        boundaries = self.dataset.boundaries(start, start + len(available)) - start
        targets = targets.clone(memory_format=torch.contiguous_format)
        targets.numpy()[self._targets_across(boundaries)] = IGNORED
        if self.documents == "mask":
            return Window(inputs, targets, None, following)
        is_first = np.zeros(length, np.int64)
        is_first[boundaries[boundaries < length]] = 1
        return Window(inputs, targets, torch.from_numpy(is_first.cumsum()), following)

    def _targets_across(self, boundaries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (i - 1, t) of all targets that a document boundary separates from their input.

        For head i, these are the targets of the i inputs before each boundary.
        """
        heads, distances = self._heads_and_distances
        rows = np.broadcast_to(heads - 1, (len(boundaries), len(heads)))
        positions = boundaries[:, None] - distances
        inside = (positions >= 0) & (positions < self.sequence_length)
        return rows[inside], positions[inside]

    def windows_at(self, indices: np.ndarray) -> list[Window]:
        """Returns the windows at these indices of the endless sequence of shuffled epochs."""
        numbers = np.empty(len(indices), np.int64)
        for epoch in np.unique(indices // self.num_windows):
            own = indices // self.num_windows == epoch
            numbers[own] = self.epoch_order(int(epoch))(indices[own] % self.num_windows)
        return [self[number] for number in numbers.tolist()]

    @property
    def targets_can_be_ignored(self) -> bool:
        """Whether some targets may be IGNORED, so that heads may have different numbers of targets."""
        return (
            self.documents != "continue"
            or self.num_windows * self.sequence_length + self.num_future_tokens > self.dataset.num_tokens
        )

    def epoch_order(self, epoch: int) -> Shuffle:
        """Returns the permutation of the windows in an epoch."""
        return Shuffle(self.num_windows, self.seed, self.stream, epoch)

    def check_ends(self) -> None:
        """Checks the first and the last CHECKED_TOKENS tokens. Raises InputError if one is outside the vocabulary."""
        self._read(0, CHECKED_TOKENS)
        self._read(max(0, self.dataset.num_tokens - CHECKED_TOKENS), self.dataset.num_tokens)

    def check_first(self, max_windows: int | None, rank: int, world_size: int) -> None:
        """Checks this rank's share of the tokens that evaluation will read.

        Args:
            max_windows: the number of windows that evaluation reads; None: all.

        Raises:
            InputError: a token is outside the vocabulary, or the .idx file is inconsistent.
        """
        num_windows = self.num_windows if max_windows is None else min(max_windows, self.num_windows)
        stop = min(num_windows * self.sequence_length + self.num_future_tokens, self.dataset.num_tokens)
        for start in range(rank * CHECKED_TOKENS, stop, world_size * CHECKED_TOKENS):
            self._read(start, min(start + CHECKED_TOKENS, stop))
            if self.documents != "continue":
                self.dataset.boundaries(start, min(start + CHECKED_TOKENS, stop))

    def _read(self, start: int, stop: int) -> np.ndarray:
        tokens = self.dataset.tokens(start, stop)
        outside = (tokens < 0) | (tokens >= self.vocab_size)
        if outside.any():
            first = int(outside.argmax())
            raise InputError(
                f"{self.dataset.name}.bin holds token {tokens[first]} in document "
                f"{self.dataset.document_at(start + first)}, but model.vocab_size is {self.vocab_size}; expected ids "
                f"from 0 to {self.vocab_size - 1}: prepare the corpus again, with the model's tokenizer"
            )
        return tokens

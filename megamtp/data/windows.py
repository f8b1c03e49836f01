"""A token file -> training windows: T inputs and, for each of them, the n tokens that follow."""

import numpy as np
import torch
from torch import Tensor

from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.errors import InputError

IGNORED = -100  # torch's own convention for a target that counts for nothing
SCANNED_TOKENS = 1 << 24


class Windows:
    """Windows of T + n tokens that advance by T through all documents in a row, crossing their boundaries as the paper's do.

    Their number and order do not depend on n, and every token after the first is head 1's target exactly once an epoch (but for
    a rest shorter than T). Only in the last windows may targets lie beyond the end: they are IGNORED.

    Args:
        sequence_length: T.
        num_future_tokens: n.
        seed: of the order of `shuffled`.

    Raises:
        InputError: the corpus has no window.
    """

    def __init__(self, dataset: IndexedDataset, sequence_length: int, num_future_tokens: int, seed: int):
        self.dataset, self.sequence_length, self.num_future_tokens, self.seed = dataset, sequence_length, num_future_tokens, seed
        self.number = (dataset.num_tokens - 1) // sequence_length
        if self.number < 1:
            raise InputError(
                f"{dataset.name} has {dataset.num_tokens} tokens; expected at least {sequence_length + 1} for windows of "
                f"train.sequence_length={sequence_length}: shorten them or add text"
            )

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(inputs [T], targets [n, T]), int64; targets[i - 1, t] is the token i positions after inputs[t]."""
        if not 0 <= index < self.number:
            raise IndexError(f"window {index} of {self.number}")
        length, start = self.sequence_length, index * self.sequence_length
        tokens = np.full(length + self.num_future_tokens, IGNORED, dtype=np.int64)
        found = self.dataset.tokens(start, start + len(tokens))
        tokens[: len(found)] = found
        window = torch.from_numpy(tokens)
        return window[:length], window[1:].unfold(0, length, 1)

    @property
    def targets_can_be_ignored(self) -> bool:
        """Whether the last window lacks targets, so that heads' counts of targets differ."""
        return self.number * self.sequence_length + self.num_future_tokens > self.dataset.num_tokens

    def shuffled(self, epoch: int) -> np.ndarray:
        """The order of the windows in an epoch: a permutation drawn from (seed, epoch)."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.number)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises: InputError if a token does not fit a model of `vocab_size`; reads the whole corpus once."""
        for start in range(0, self.dataset.num_tokens, SCANNED_TOKENS):
            tokens = self.dataset.tokens(start, start + SCANNED_TOKENS)
            for token in (int(tokens.min()), int(tokens.max())):
                if not 0 <= token < vocab_size:
                    raise InputError(
                        f"{self.dataset.name} holds token {token}, model.vocab_size is {vocab_size}; expected tokens from 0 to "
                        "below it: the corpus was made with another tokenizer than the model's"
                    )

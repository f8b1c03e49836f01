"""Mixes several corpora into one endless sequence of windows, each with a fixed share of any long stretch.

Weights are rounded to multiples of 1/65536. The blend is periodic: a period of 65,536 windows is laid out once, such
that every prefix of the sequence holds each corpus's share to within one window. Each corpus runs through its own
shuffled epochs.
"""

import heapq
import math

import numpy as np

from megamtp.data.windows import Window, Windows

PERIOD = 65536  # windows


class Blend:
    """An endless sequence of windows from several corpora.

    Args:
        weights: one per corpus, above 0; they are divided by their sum.
        first_windows: for each corpus, the index in its own endless sequence at which the blend starts. None: 0 for
            all.

    Attributes:
        shares: int64 [corpora], the number of windows of each corpus in a period.
    """

    def __init__(self, corpora: list[Windows], weights: list[float], first_windows: list[int] | None = None):
        self.corpora, self.shares = corpora, windows_per_period(weights)
        self.first_windows = first_windows or [0] * len(corpora)
        self._corpus = interleave(self.shares)
        self._offset_in_corpus = np.empty(PERIOD, np.int64)  # number of earlier windows of the same corpus
        for corpus, share in enumerate(self.shares):
            self._offset_in_corpus[self._corpus == corpus] = np.arange(share)

    def windows_at(self, indices: np.ndarray) -> list[Window]:
        """Returns the windows at these indices of the endless sequence."""
        periods, offsets = np.divmod(indices, PERIOD)
        windows: list = [None] * len(indices)
        for corpus in np.unique(self._corpus[offsets]):
            (own,) = (self._corpus[offsets] == corpus).nonzero()
            own_indices = periods[own] * self.shares[corpus] + self._offset_in_corpus[offsets[own]]
            own_windows = self.corpora[corpus].windows_at(self.first_windows[corpus] + own_indices)
            for position, window in zip(own, own_windows, strict=True):
                windows[position] = window
        return windows

    @property
    def targets_can_be_ignored(self) -> bool:
        """Whether some targets may be IGNORED, so that heads may have different numbers of targets."""
        return any(corpus.targets_can_be_ignored for corpus in self.corpora)

    def count_windows(self, num_windows: int) -> list[int]:
        """Returns how many of the blend's first `num_windows` windows come from each corpus."""
        periods, rest = divmod(num_windows, PERIOD)
        return (periods * self.shares + np.bincount(self._corpus[:rest], minlength=len(self.shares))).tolist()


def windows_per_period(weights: list[float]) -> np.ndarray:
    """Returns int64 [corpora] with sum PERIOD: the weights' proportions, rounded, but at least 1 each."""
    exact = np.array(weights) / math.fsum(weights) * PERIOD
    shares = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := PERIOD - int(shares.sum())) != 0:
        error = (exact - shares) * np.sign(missing)
        error[(shares == 1) & (missing < 0)] = -np.inf
        shares[np.argmax(error)] += np.sign(missing)
    return shares


def interleave(shares: np.ndarray) -> np.ndarray:
    """Returns the corpus of each window of a period, int64 [PERIOD].

    Of the first k windows, each corpus has k * share / PERIOD to within one window. With m corpora, the j-th window of
    a corpus (from 0) may come as soon as k * share / PERIOD reaches j + 1 / (2 m - 2), and must come before that number
    exceeds j + 1 - 1 / (2 m - 2). Of the windows that may come, the one with the earliest deadline is next.

    Source: Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32, theorem 1.
    """
    if len(shares) == 1:
        return np.zeros(PERIOD, np.int64)
    parts = 2 * len(shares) - 2
    released: list[list] = [[] for _ in range(PERIOD + 1)]
    for corpus, share in enumerate(shares.tolist()):
        for number in range(share):
            release = -(-PERIOD * (number * parts + 1) // (share * parts))
            deadline = PERIOD * (number * parts + parts - 1) // (share * parts)
            released[release].append((deadline, corpus))
    waiting: list[tuple[int, int]] = []
    corpora = np.empty(PERIOD, np.int64)
    for index in range(PERIOD):
        for window in released[index + 1]:
            heapq.heappush(waiting, window)
        corpora[index] = heapq.heappop(waiting)[1]
    return corpora

"""Several corpora as one endless sequence of windows, each with its share of every stretch of it.

Weights are rounded to 1/65536. One period of 65,536 windows is laid out when the blend is made, such that up to any
place every corpus has had its share to within one window; the periods follow one another, and each corpus goes through
its own epochs.
"""

import heapq
import math

import numpy as np

from megamtp.data.windows import Window, Windows

PERIOD = 65536


class Blend:
    """Windows of several corpora in one sequence.

    Args:
        weights: of each, above 0; they are divided by their sum.
        first_windows: place in each corpus's own endless sequence at which the blend begins; None: at the beginning of
            all.

    Attributes:
        shares: int64, the windows of each corpus in a period.
    """

    def __init__(self, corpora: list[Windows], weights: list[float], first_windows: list[int] | None = None):
        self.corpora, self.shares = corpora, quantise(weights)
        self.first_windows = first_windows or [0] * len(corpora)
        self._corpus = layout(self.shares)
        self._place = np.empty(PERIOD, np.int64)  # of each window of a period among those of its corpus
        for index, share in enumerate(self.shares):
            self._place[self._corpus == index] = np.arange(share)

    def at(self, places: np.ndarray) -> list[Window]:
        """The windows at these places of the endless sequence."""
        periods, within = np.divmod(places, PERIOD)
        windows: list = [None] * len(places)
        for index in np.unique(self._corpus[within]):
            (own,) = (self._corpus[within] == index).nonzero()
            own_places = self.first_windows[index] + periods[own] * self.shares[index] + self._place[within[own]]
            for position, window in zip(own, self.corpora[index].at(own_places), strict=True):
                windows[position] = window
        return windows

    @property
    def targets_can_be_ignored(self) -> bool:
        """Whether a window may lack targets, so that heads' counts of targets differ."""
        return any(corpus.targets_can_be_ignored for corpus in self.corpora)

    def counts(self, num_windows: int) -> list[int]:
        """How many of the blend's first windows come from each corpus."""
        periods, rest = divmod(num_windows, PERIOD)
        return (periods * self.shares + np.bincount(self._corpus[:rest], minlength=len(self.shares))).tolist()


def quantise(weights: list[float]) -> np.ndarray:
    """int64 [corpora], at least 1 each, PERIOD in all: the nearest to the weights' own proportions."""
    exact = np.array(weights) / math.fsum(weights) * PERIOD
    shares = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := PERIOD - int(shares.sum())) != 0:
        behind = (exact - shares) * np.sign(missing)
        behind[(shares == 1) & (missing < 0)] = -np.inf
        shares[np.argmax(behind)] += np.sign(missing)
    return shares


def layout(shares: np.ndarray) -> np.ndarray:
    """The corpus of each window of a period, int64 [PERIOD]: of the first k, each has within one of k * share / PERIOD.

    A corpus's j-th window may come once its due share exceeds j by 1 / (2 m - 2), of m corpora, and must before it
    exceeds j by 1 - 1 / (2 m - 2); of those that may come, the one that must come first does.
    Source: Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32, theorem 1.
    """
    if len(shares) == 1:
        return np.zeros(PERIOD, np.int64)
    parts = 2 * len(shares) - 2
    may_come: list[list] = [[] for _ in range(PERIOD + 1)]
    for corpus, share in enumerate(shares.tolist()):
        for number in range(share):
            release = -(-PERIOD * (number * parts + 1) // (share * parts))
            deadline = PERIOD * (number * parts + parts - 1) // (share * parts)
            may_come[release].append((deadline, corpus))
    waiting: list[tuple[int, int]] = []
    chosen = np.empty(PERIOD, np.int64)
    for place in range(PERIOD):
        for entry in may_come[place + 1]:
            heapq.heappush(waiting, entry)
        chosen[place] = heapq.heappop(waiting)[1]
    return chosen

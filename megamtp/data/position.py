"""Which windows a run has trained on. Checkpoints save it, so that a resumed run starts at the first window it has not
seen.

The position counts windows, not steps, so a resumed run may change train.global_batch_tokens. A change of what a window
is, or of the order of windows, is refused unless data.accept_changes is set.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamtp.data.blend import PERIOD, Blend, quantise
from megamtp.data.windows import Windows
from megamtp.errors import CheckpointError

# beyond which repeated text is worth clearly less than new text: Muennighoff et al. 2023, arXiv:2305.16264
MANY_EPOCHS = 4


@dataclass(frozen=True)
class CorpusPosition:
    """How far a run has read one corpus.

    Attributes:
        prefix: of its files.
        num_tokens, crc32: its size and the checksum of its first and last tokens; they identify it wherever its files
            lie.
        stream: part of the key of its shuffles.
        share: its windows among 65,536 of the blend.
        first_window, first_tokens: next_window and trained_tokens when the present blend began.
        next_window: place in the endless sequence of its shuffled epochs of the first window that has not been trained
            on.
        trained_tokens: tokens of all its windows that have been trained on.
    """

    prefix: str
    num_tokens: int
    crc32: int
    stream: int
    share: int
    first_window: int = 0
    first_tokens: int = 0
    next_window: int = 0
    trained_tokens: int = 0

    @property
    def epochs(self) -> float:
        """How often all its tokens have been trained on."""
        return self.trained_tokens / self.num_tokens


@dataclass(frozen=True)
class DataPosition:
    """How far a run has read its data.

    Attributes:
        sequence_length, seed, documents: as in the configuration; with the corpora and their shares they define the
            windows.
        windows: of the present blend, that have been trained on.
        left: corpora of earlier blends that the present one lacks; one that comes back goes on where it was.
    """

    sequence_length: int
    seed: int
    documents: str
    windows: int
    corpora: list[CorpusPosition]
    left: list[CorpusPosition] = field(default_factory=list)

    def saved(self) -> dict[str, Any]:
        """What `read_position` reads, as JSON holds it."""
        return dataclasses.asdict(self)

    def blend(self, corpora: list[Windows]) -> Blend:
        """The blend that it is a position of.

        Args:
            corpora: those it was made for, in their order.
        """
        own = []
        for windows, corpus in zip(corpora, self.corpora, strict=True):
            own.append(copy.copy(windows))
            own[-1].stream = corpus.stream
        return Blend(own, [corpus.share for corpus in self.corpora], [corpus.first_window for corpus in self.corpora])

    def advanced(self, blend: Blend, windows: int) -> "DataPosition":
        """The position when the first `windows` windows of the blend have been trained on."""
        corpora = [
            dataclasses.replace(
                corpus,
                next_window=corpus.first_window + number,
                trained_tokens=corpus.first_tokens + number * self.sequence_length,
            )
            for corpus, number in zip(self.corpora, blend.counts(windows), strict=True)
        ]
        return dataclasses.replace(self, windows=windows, corpora=corpora)

    def passes(self) -> list[str]:
        """If it is the position at the end of a run: a line for each corpus that says how often the run passes over
        it.
        """
        weighted = len(self.corpora) > 1
        return [
            f"{corpus.prefix}: {f'{corpus.share / PERIOD:.5f} of the windows, ' if weighted else ''}"
            f"{corpus.trained_tokens:,} tokens of training from {corpus.num_tokens:,}, {corpus.epochs:.3g} epochs"
            for corpus in self.corpora
        ]

    def warnings(self) -> list[str]:
        """If it is the position at the end of a run: a line for each corpus that is repeated too often."""
        return [
            f"megamtp: warning: {corpus.prefix} is repeated {corpus.epochs:.3g} times; expected at most {MANY_EPOCHS} "
            "epochs: beyond that a model memorises its text; add text or lower train.steps"
            for corpus in self.corpora
            if corpus.epochs > MANY_EPOCHS
        ]


def new_position(corpora: list[Windows], weights: list[float]) -> DataPosition:
    """The position of a new run."""
    shares = quantise(weights).tolist()
    return _position(
        [_unread(windows, *own) for windows, *own in zip(corpora, range(len(corpora)), shares, strict=True)], corpora
    )


def read_position(saved: dict[str, Any], checkpoint: Path) -> DataPosition:
    """What `DataPosition.saved` returned. Raises CheckpointError: it lacks a field or has an unknown one."""
    try:
        corpora, left = (
            [CorpusPosition(**corpus) for corpus in part] for part in (saved["corpora"], saved.get("left", []))
        )
        return DataPosition(**{**saved, "corpora": corpora, "left": left})
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}: its position in the data cannot be read ({error}); remove it to go on from an older one"
        ) from None


def find_changes(saved: DataPosition, corpora: list[Windows], weights: list[float]) -> list[str]:
    """`name was ..., is now ...` of everything by which the windows, or their order, differ from those of a saved
    position.
    """
    windows = corpora[0]
    settings = (
        ("train.sequence_length", saved.sequence_length, windows.sequence_length),
        ("train.seed", saved.seed, windows.seed),
        ("data.documents", saved.documents, windows.documents),
    )
    found = [f"{key} was {before}, is now {after}" for key, before, after in settings if before != after]
    matches = list(_matches(saved.corpora, corpora))
    kept = [match for match in matches if match]
    found += [
        f"data.train: {corpus.prefix} is missing or has other tokens" for corpus in saved.corpora if corpus not in kept
    ]
    for windows, match, share in zip(corpora, matches, quantise(weights).tolist(), strict=True):
        if match is None:
            found.append(f"data.train: {windows.dataset.name} is new")
        elif match.share != share:
            before, after = (f"{part / PERIOD:.5f}" for part in (match.share, share))
            found.append(f"data.train: the share of {windows.dataset.name} was {before}, is now {after}")
    if kept != saved.corpora and sorted(map(saved.corpora.index, kept)) == list(range(len(saved.corpora))):
        found.append("data.train: the corpora are in another order")
    return found


def resumed_position(
    saved: DataPosition, corpora: list[Windows], weights: list[float]
) -> tuple[DataPosition, list[str]]:
    """Where a run goes on although its windows change, and a line for each corpus that says so.

    A new blend begins. A corpus whose windows and their order are as before goes on at its next window. Otherwise its
    new windows start with the next epoch, whose order no earlier step has used.
    """
    windows = corpora[0]
    same_order = (saved.sequence_length, saved.seed) == (windows.sequence_length, windows.seed)
    known = [*saved.corpora, *saved.left]
    if not same_order:
        known = [_at_next_epoch(corpus, saved.sequence_length, windows.sequence_length) for corpus in known]
    next_stream = max(corpus.stream for corpus in known) + 1
    matches = list(_matches(known, corpora))
    positions, lines = [], []
    for windows, match, share in zip(corpora, matches, quantise(weights).tolist(), strict=True):
        corpus = _unread(windows, match.stream if match else next_stream, share)
        if match:
            window = match.next_window
            corpus = dataclasses.replace(
                corpus,
                first_window=window,
                next_window=window,
                first_tokens=match.trained_tokens,
                trained_tokens=match.trained_tokens,
            )
            where = f"goes on at window {window % len(windows)} of its epoch {window // len(windows) + 1}"
            repeated = "" if same_order else ", in a new order: it may repeat text of an epoch that was not finished"
            lines.append(f"{corpus.prefix}: {where}, after {match.trained_tokens:,} tokens of training{repeated}")
        else:
            next_stream += 1
            lines.append(f"{corpus.prefix}: starts at its first window")
        positions.append(corpus)
    left = [corpus for corpus in known if corpus not in matches]
    return dataclasses.replace(_position(positions, corpora), left=left), lines


def _at_next_epoch(corpus: CorpusPosition, old_length: int, new_length: int) -> CorpusPosition:
    """The position at the start of the epoch after the present one, in windows of new_length tokens instead of
    old_length.
    """
    old_windows, new_windows = (max(1, (corpus.num_tokens - 1) // length) for length in (old_length, new_length))
    return dataclasses.replace(corpus, next_window=-(-corpus.next_window // old_windows) * new_windows)


def _position(positions: list[CorpusPosition], corpora: list[Windows]) -> DataPosition:
    windows = corpora[0]
    return DataPosition(windows.sequence_length, windows.seed, windows.documents, 0, positions)


def _unread(windows: Windows, stream: int, share: int) -> CorpusPosition:
    dataset = windows.dataset
    return CorpusPosition(dataset.name, dataset.num_tokens, dataset.crc32_of_ends(), stream, share)


def _matches(saved: list[CorpusPosition], corpora: list[Windows]) -> Iterator[CorpusPosition | None]:
    """For each corpus its saved position, found by its content; of equal corpora the first that is left."""
    left = list(saved)
    for windows in corpora:
        content = (windows.dataset.num_tokens, windows.dataset.crc32_of_ends())
        match = next((corpus for corpus in left if (corpus.num_tokens, corpus.crc32) == content), None)
        if match:
            left.remove(match)
        yield match

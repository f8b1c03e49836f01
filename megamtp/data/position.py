"""The position of a run in its data. Checkpoints save it, so that a resumed run continues at the next window.

The position counts windows, not steps, so a resumed run may change train.global_batch_tokens. Changes to the windows or
to their order are refused unless data.accept_changes is set.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamtp.data.blend import PERIOD, Blend, windows_per_period
from megamtp.data.windows import Windows
from megamtp.errors import CheckpointError

# With more epochs, repeated text is worth clearly less than new text. Source: Muennighoff et al. 2023, arXiv:2305.16264
MANY_EPOCHS = 4


@dataclass(frozen=True)
class CorpusPosition:
    """The position of a run in one corpus.

    Attributes:
        prefix: of the corpus's files.
        num_tokens, crc32: the size of the corpus and the checksum of its first and last tokens. They identify the
            corpus even if its files are moved.
        stream: part of the key of its shuffles.
        share: its number of windows in a period of the blend (65,536 windows).
        first_window, first_tokens: next_window and trained_tokens at the start of the current blend.
        next_window: index of the next window to train on, in the endless sequence of the corpus's shuffled epochs.
        trained_tokens: the number of tokens in the windows that have been trained on.
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
        """The number of tokens trained on, divided by the number of tokens in the corpus."""
        return self.trained_tokens / self.num_tokens


@dataclass(frozen=True)
class DataPosition:
    """The position of a run in its data.

    Attributes:
        sequence_length, seed, documents: as in the configuration. Together with the corpora and their shares, they
            determine the windows and their order.
        windows: the number of windows of the current blend that have been trained on.
        left: corpora of earlier blends that are not in the current blend. If they are added again, they continue at
            their position.
    """

    sequence_length: int
    seed: int
    documents: str
    windows: int
    corpora: list[CorpusPosition]
    left: list[CorpusPosition] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns the position as JSON data, which `read_position` reads."""
        return dataclasses.asdict(self)

    def blend(self, corpora: list[Windows]) -> Blend:
        """Returns the blend that this position belongs to.

        Args:
            corpora: the same corpora as those of the position, in the same order.
        """
        copies = [copy.copy(windows) for windows in corpora]
        for windows, corpus in zip(copies, self.corpora, strict=True):
            windows.stream = corpus.stream
        shares, first_windows = zip(*((corpus.share, corpus.first_window) for corpus in self.corpora), strict=True)
        return Blend(copies, list(shares), list(first_windows))

    def advanced(self, blend: Blend, windows: int) -> "DataPosition":
        """Returns the position after training on the first `windows` windows of the blend."""
        corpora = [
            dataclasses.replace(
                corpus,
                next_window=corpus.first_window + num_windows,
                trained_tokens=corpus.first_tokens + num_windows * self.sequence_length,
            )
            for corpus, num_windows in zip(self.corpora, blend.count_windows(windows), strict=True)
        ]
        return dataclasses.replace(self, windows=windows, corpora=corpora)

    def describe_epochs(self) -> list[str]:
        """Returns a line for each corpus with its number of epochs. For the position at the end of a run."""
        weighted = len(self.corpora) > 1
        return [
            f"{corpus.prefix}: {f'{corpus.share / PERIOD:.5f} of the windows, ' if weighted else ''}"
            f"{corpus.trained_tokens:,} tokens of training from {corpus.num_tokens:,}, {corpus.epochs:.3g} epochs"
            for corpus in self.corpora
        ]

    def warnings(self) -> list[str]:
        """Returns a warning for each corpus that is repeated too often. For the position at the end of a run."""
        return [
            f"megamtp: warning: {corpus.prefix} is repeated {corpus.epochs:.3g} times; expected at most {MANY_EPOCHS} "
            "epochs: beyond that a model memorises its text; add text or lower train.steps"
            for corpus in self.corpora
            if corpus.epochs > MANY_EPOCHS
        ]


def new_position(corpora: list[Windows], weights: list[float]) -> DataPosition:
    """Returns the position of a new run."""
    shares = windows_per_period(weights).tolist()
    positions = [
        _start(windows, stream, share) for stream, (windows, share) in enumerate(zip(corpora, shares, strict=True))
    ]
    return _position(positions, corpora)


def read_position(saved: dict[str, Any], checkpoint: Path) -> DataPosition:
    """Returns the position of which `DataPosition.to_json` returned `saved`.

    Raises:
        CheckpointError: a field is missing or unknown.
    """
    try:
        corpora, left = (
            [CorpusPosition(**corpus) for corpus in positions]
            for positions in (saved["corpora"], saved.get("left", []))
        )
        return DataPosition(**{**saved, "corpora": corpora, "left": left})
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}: its position in the data cannot be read ({error}); remove it to resume from an older one"
        ) from None


def find_changes(saved: DataPosition, corpora: list[Windows], weights: list[float]) -> list[str]:
    """Returns a line for each setting or corpus that changes the windows or their order since `saved`."""
    windows = corpora[0]
    settings = (
        ("train.sequence_length", saved.sequence_length, windows.sequence_length),
        ("train.seed", saved.seed, windows.seed),
        ("data.documents", saved.documents, windows.documents),
    )
    changes = [f"{key} was {before}, is now {after}" for key, before, after in settings if before != after]
    matches = list(_matches(saved.corpora, corpora))
    kept = [match for match in matches if match]
    changes += [
        f"data.train: {corpus.prefix} is missing or has other tokens" for corpus in saved.corpora if corpus not in kept
    ]
    for windows, match, share in zip(corpora, matches, windows_per_period(weights).tolist(), strict=True):
        if match is None:
            changes.append(f"data.train: {windows.dataset.name} is new")
        elif match.share != share:
            before, after = f"{match.share / PERIOD:.5f}", f"{share / PERIOD:.5f}"
            changes.append(f"data.train: the share of {windows.dataset.name} was {before}, is now {after}")
    if kept != saved.corpora and sorted(map(saved.corpora.index, kept)) == list(range(len(saved.corpora))):
        changes.append("data.train: the corpora are in another order")
    return changes


def resumed_position(
    saved: DataPosition, corpora: list[Windows], weights: list[float]
) -> tuple[DataPosition, list[str]]:
    """Returns the position at which a run with changed windows resumes, and a line for each corpus that describes it.

    A new blend begins. If the windows of a corpus and their order are unchanged, it continues at its next window.
    Otherwise it starts with the next epoch, whose order no earlier step has used.
    """
    windows = corpora[0]
    same_order = (saved.sequence_length, saved.seed) == (windows.sequence_length, windows.seed)
    known = [*saved.corpora, *saved.left]
    if not same_order:
        known = [_at_next_epoch(corpus, saved.sequence_length, windows.sequence_length) for corpus in known]
    next_stream = max(corpus.stream for corpus in known) + 1
    matches = list(_matches(known, corpora))
    positions, lines = [], []
    for windows, match, share in zip(corpora, matches, windows_per_period(weights).tolist(), strict=True):
        corpus = _start(windows, match.stream if match else next_stream, share)
        if match:
            window = match.next_window
            corpus = dataclasses.replace(
                corpus,
                first_window=window,
                next_window=window,
                first_tokens=match.trained_tokens,
                trained_tokens=match.trained_tokens,
            )
            where = f"continues at window {window % len(windows)} of its epoch {window // len(windows) + 1}"
            repeated = "" if same_order else ", in a new order: it may repeat text of an unfinished epoch"
            lines.append(f"{corpus.prefix}: {where}, after {match.trained_tokens:,} tokens of training{repeated}")
        else:
            next_stream += 1
            lines.append(f"{corpus.prefix}: starts at its first window")
        positions.append(corpus)
    left = [corpus for corpus in known if corpus not in matches]
    return dataclasses.replace(_position(positions, corpora), left=left), lines


def _at_next_epoch(corpus: CorpusPosition, old_length: int, new_length: int) -> CorpusPosition:
    """Returns the position at the start of the next epoch, in windows of new_length tokens instead of old_length."""
    old_windows, new_windows = (max(1, (corpus.num_tokens - 1) // length) for length in (old_length, new_length))
    return dataclasses.replace(corpus, next_window=-(-corpus.next_window // old_windows) * new_windows)


def _position(positions: list[CorpusPosition], corpora: list[Windows]) -> DataPosition:
    windows = corpora[0]
    return DataPosition(windows.sequence_length, windows.seed, windows.documents, 0, positions)


def _start(windows: Windows, stream: int, share: int) -> CorpusPosition:
    dataset = windows.dataset
    return CorpusPosition(dataset.name, dataset.num_tokens, dataset.crc32_of_ends(), stream, share)


def _matches(saved: list[CorpusPosition], corpora: list[Windows]) -> Iterator[CorpusPosition | None]:
    """Yields for each corpus the saved position with the same content, or None. Each position is used only once."""
    unused = list(saved)
    for windows in corpora:
        content = (windows.dataset.num_tokens, windows.dataset.crc32_of_ends())
        match = next((corpus for corpus in unused if (corpus.num_tokens, corpus.crc32) == content), None)
        if match:
            unused.remove(match)
        yield match

"""Where a job starts: at the newest checkpoint of its run, and at the first window on which the run has not trained.

Tests: tests/distributed/test_training.py, tests/end_to_end/test_resume.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from megamtp.checkpoint.special_ids import write_special_ids
from megamtp.checkpoint.store import remove_leftovers
from megamtp.cluster.environment import Place, of_all_ranks, raised_by_all
from megamtp.config import RESOLVED, Config, differences, write_config
from megamtp.console import print_line, print_warning
from megamtp.data.loader import TrainLoader
from megamtp.data.position import DataPosition
from megamtp.engines.initial_weights import open_initial_weights, without_initial_weights
from megamtp.errors import InputError
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import lacks_validation
from megamtp.training.preflight import CheckedRun, find_position, report_vocabulary
from megamtp.training.resuming import newest_verified


@dataclass(frozen=True)
class Start:
    """The state of a run when a job starts.

    Attributes:
        checkpoint: the newest intact one; None in a new run.
        step: the steps of the run so far.
        position: in the training data.
        notes: lines for the user about the position, where it is not obvious.
        owes_evaluation: an evaluation follows step `step`, and the job before did not finish it.
    """

    checkpoint: Path | None
    step: int
    position: DataPosition
    notes: list[str]
    owes_evaluation: bool


def check_agreement(run: CheckedRun) -> None:
    """Compares settings and corpora of all ranks. Collective.

    Raises:
        InputError: one rank has others, as where nodes start different scripts; on all ranks.
    """
    if run.config.cluster.emulate:
        return
    corpora = filter(None, (*run.train, run.validation))
    first, *others = of_all_ranks((run.config, [corpus.dataset.num_tokens for corpus in corpora]))
    for rank, other in enumerate(others, start=1):
        if other != first:
            found = next(iter(differences(first[0], other[0])), f"corpora of {first[1]} -> {other[1]} tokens")
            raise InputError(
                f"rank {rank} is not started as rank 0 is ({found}); expected the same arguments and corpora on all"
            )


def find_start(run: CheckedRun, place: Place) -> Start | None:
    """Returns where the job starts; None if the run is complete. Collective.

    Raises:
        CheckpointError: the run has checkpoints, but none is intact.
        InputError: the windows differ from those of the run so far, and data.accept_changes is not set.
    """
    from megamtp.training.loop import evaluation_due

    config, run_directory = run.config, Path(run.config.run.directory)
    newest = None if config.cluster.emulate else newest_verified(run_directory, place.rank, place.world_size)
    step = newest[1].step if newest else 0
    owes_evaluation = False
    if evaluation_due(config, step):
        with raised_by_all():
            owes_evaluation = place.rank == 0 and lacks_validation(run_directory / METRICS, step)
        owes_evaluation = any(of_all_ranks(owes_evaluation))
    if step >= config.train.steps and not owes_evaluation:
        if place.rank == 0:
            print_line(f"{run_directory} has all its {config.train.steps} steps already; nothing to do")
        return None
    with raised_by_all():
        position, notes = find_position(config, run.train, newest)
    return Start(newest[0] if newest else None, step, position, notes, owes_evaluation)


def open_loader(run: CheckedRun, start: Start) -> TrainLoader:
    """Returns this rank's reader of micro-batches, at the start's position."""
    train = run.config.train
    windows = run.config.global_batch_windows
    blend = start.position.blend(run.train)
    return TrainLoader(blend, windows, train.micro_batch_size, *run.readers, start.step, start.position.windows)


def engine_config(run: CheckedRun, start: Start) -> Config:
    """Returns the engine's configuration. A resumed run has all its weights, and does not read initial ones again."""
    return without_initial_weights(run.config) if start.checkpoint else run.config


def begin(run: CheckedRun, start: Start, loader: TrainLoader, place: Place) -> None:
    """Seeds the rank's random numbers. On rank 0, prints what the user should know and prepares the run directory.

    Raises:
        OSError: the run directory cannot be written.
    """
    # A checkpoint holds each rank's random state: it must not depend on what happened before.
    torch.manual_seed((run.config.train.seed << 24) + place.rank)
    if place.rank > 0:
        return
    report_vocabulary(run.config)
    at_end = start.position.advanced(start.position.blend(run.train), loader.windows_before(run.config.train.steps))
    for line in (*run.changes, *start.notes, *at_end.describe_epochs(), *at_end.warnings()):
        print_line(line)
    _prepare_directory(run.config, is_new=start.checkpoint is None)


def _prepare_directory(config: Config, is_new: bool) -> None:
    """Writes configuration and special ids, and removes half-written files of an earlier job. Raises OSError."""
    run_directory = Path(config.run.directory)
    write_config(config, run_directory / RESOLVED)
    if config.run.initial_weights and is_new:
        write_special_ids(run_directory, open_initial_weights(config).special_ids)
    for leftover in remove_leftovers(run_directory):
        print_warning(f"{leftover} cannot be removed; it is of no use")

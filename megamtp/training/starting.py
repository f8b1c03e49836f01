"""Finds where a job starts: the newest checkpoint of its run, and the first window on which the run has not trained.

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
from megamtp.model.cost import describe_trunk
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import lacks_validation
from megamtp.training.preflight import CheckedRun, find_position, report_vocabulary
from megamtp.training.resuming import newest_verified


@dataclass(frozen=True)
class Start:
    """The state of a run when a job starts.

    Attributes:
        checkpoint: the newest intact checkpoint; None in a new run.
        step: number of steps taken so far.
        position: position in the training data.
        notes: lines that explain the position to the user, if it needs an explanation.
        evaluate_first: whether to evaluate before the first step, because the previous job did not finish the
            evaluation after `step`.
    """

    checkpoint: Path | None
    step: int
    position: DataPosition
    notes: list[str]
    evaluate_first: bool


def check_agreement(run: CheckedRun) -> None:
    """Checks that all ranks have the same settings and corpora. Collective.

    Raises:
        InputError: on all ranks; a rank was started differently, for example by another script on its node.
    """
    if run.config.cluster.emulate:
        return
    corpora = filter(None, (*run.train, run.validation))
    first, *others = of_all_ranks((run.config, [corpus.dataset.num_tokens for corpus in corpora]))
    for rank, other in enumerate(others, start=1):
        if other != first:
            difference = next(iter(differences(first[0], other[0])), f"corpora of {first[1]} -> {other[1]} tokens")
            raise InputError(
                f"rank {rank} was not started like rank 0 ({difference}); expected the same arguments and corpora"
            )


def find_start(run: CheckedRun, place: Place) -> Start | None:
    """Returns where the job starts; None if the run is complete. Collective.

    Raises:
        CheckpointError: the run has checkpoints, but none is intact.
        InputError: the windows differ from the previous job's, and data.accept_changes is not set.
    """
    # Imported late: see pretrain.py.
    from megamtp.training.loop import is_evaluation_step

    config, run_directory = run.config, Path(run.config.run.directory)
    newest = None if config.cluster.emulate else newest_verified(run_directory, place.rank, place.world_size)
    step = newest[1].step if newest else 0
    evaluate_first = False
    if is_evaluation_step(config, step):
        with raised_by_all():
            evaluate_first = place.rank == 0 and lacks_validation(run_directory / METRICS, step)
        evaluate_first = any(of_all_ranks(evaluate_first))
    if step >= config.train.steps and not evaluate_first:
        if place.rank == 0:
            print_line(f"{run_directory} already has all {config.train.steps} steps; nothing to do")
        return None
    with raised_by_all():
        position, notes = find_position(config, run.train, newest)
    return Start(newest[0] if newest else None, step, position, notes, evaluate_first)


def open_loader(run: CheckedRun, start: Start) -> TrainLoader:
    """Returns the loader that reads this rank's micro-batches from the start's position."""
    train = run.config.train
    windows = run.config.global_batch_windows
    blend = start.position.blend(run.train)
    return TrainLoader(
        blend, windows, train.micro_batch_size, *run.data_parallel_rank_and_size, start.step, start.position.windows
    )


def engine_config(run: CheckedRun, start: Start) -> Config:
    """Returns the engine's configuration. A resumed run does not read initial weights again."""
    return without_initial_weights(run.config) if start.checkpoint else run.config


def prepare(run: CheckedRun, start: Start, loader: TrainLoader, place: Place) -> None:
    """Seeds this rank's random numbers. Rank 0 also prints notes for the user and prepares the run directory.

    Raises:
        OSError: the run directory cannot be written.
    """
    # Checkpoints contain each rank's random state, which must not depend on what the process did before.
    torch.manual_seed((run.config.train.seed << 24) + place.rank)
    if place.rank > 0:
        return
    report_vocabulary(run.config)
    if trunk := describe_trunk(run.config.model):
        print_line(trunk)
    at_end = start.position.advanced(start.position.blend(run.train), loader.first_window(run.config.train.steps))
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
        print_warning(f"{leftover} cannot be removed; it is not needed")

"""Pretrains a multi-token model.

    deepspeed --module megamtp.pretrain configs/quickstart.yaml model.num_future_tokens=4 optimizer.lr=3e-4
    torchrun --nproc-per-node 8 -m megamtp.pretrain configs/1.3b_n4.yaml data.train=corpus/train run.directory=runs/1.3b
    python -m megamtp.pretrain configs/quickstart.yaml          (one rank)

Later arguments override earlier ones. A run directory that holds checkpoints is resumed, from the newest that is
undamaged, with any engine on any number of ranks.
"""

import atexit
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

# first: it looks for the launcher, which may die while torch is imported
from megamtp.cluster.signals import SIGNALS, StopRequest

# isort: split
import torch

from megamtp.checkpoint.special_ids import write_special_ids
from megamtp.checkpoint.store import remove_leftovers
from megamtp.cluster.environment import Place, emulated_place, find_place, of_all_ranks, raised_by_all, share_error
from megamtp.commands.command_line import ignore_deprecated_collectives
from megamtp.config import RESOLVED, Config, differences, print_help, read_config, write_config
from megamtp.console import print_all_characters, print_error, print_line, print_warning
from megamtp.data.loader import TrainLoader
from megamtp.engines.deepspeed.join import join_peers
from megamtp.engines.initial_weights import open_initial_weights, without_initial_weights
from megamtp.errors import InputError, translate_os_error
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import lacks_validation
from megamtp.training.preflight import CheckedRun, check, find_position, report_vocabulary
from megamtp.training.resuming import newest_verified

RANK_0_SPEAKS_SECONDS = 10  # for it to say what is wrong; its launcher then ends the others, while they sleep


def main(arguments: list[str]) -> int:
    """Trains and returns the exit status: 0, or run.requeue_exit_code after an early stop. Raises InputError."""
    if print_help(arguments, __doc__):
        return 0
    place = find_place()
    run: CheckedRun | None = None
    error: Exception | None = None
    try:
        config = read_config([argument for argument in arguments if not argument.startswith("--local_rank")])
        run = check(config, emulated_place(place, config.cluster))
    except Exception as caught:  # other ranks may wait to be told, whatever it is
        error = caught
    share_error(place, error)
    assert run  # or share_error would have raised the error
    finished = _train(run, emulated_place(place, config.cluster))
    _leave_peers()
    return 0 if finished else config.run.requeue_exit_code


def _train(run: CheckedRun, place: Place) -> bool:
    """False if it ended early, saved, because a rank was asked to stop. Collective."""
    config, run_directory = run.config, Path(run.config.run.directory)
    stop = StopRequest(launched=place.world_size > 1 and not config.cluster.emulate)
    join_peers(place, config.cluster)
    stop.listen()
    if not config.cluster.emulate:
        corpora = filter(None, (*run.train, run.validation))
        _check_agreement(config, [corpus.dataset.num_tokens for corpus in corpora])
    from megamtp.engines.build import build_engine
    from megamtp.training.loop import Training, evaluation_due

    found = None if config.cluster.emulate else newest_verified(run_directory, place.rank, place.world_size)
    first_step = found[1].step if found else 0
    owes_evaluation = False
    if evaluation_due(config, first_step):
        with raised_by_all():
            owes_evaluation = place.rank == 0 and lacks_validation(run_directory / METRICS, first_step)
        owes_evaluation = any(of_all_ranks(owes_evaluation))
    if first_step >= config.train.steps and not owes_evaluation:
        if place.rank == 0:
            print_line(f"{run_directory} has all its {config.train.steps} steps already; nothing to do")
        return True
    with raised_by_all():
        position, notes = find_position(config, run.train, found)
        blend = position.blend(run.train)
        batch = config.global_batch_windows, config.train.micro_batch_size
        train = TrainLoader(blend, *batch, *run.readers, first_step, position.windows)
        if place.rank == 0:
            report_vocabulary(config)
    # Every weight of a resumed run is in its checkpoint; what it once started from may be gone.
    engine = build_engine(without_initial_weights(config) if found else config, run.cut)
    with raised_by_all():
        if place.rank == 0:
            at_end = position.advanced(blend, train.windows_before(config.train.steps))
            for line in (*run.changes, *notes, *at_end.describe_epochs(), *at_end.warnings()):
                print_line(line)
            _prepare_directory(config, resumes=found is not None)
    # or checkpoints would differ in random states that nothing has used
    torch.manual_seed((config.train.seed << 24) + place.rank)
    if found:
        engine.load(found[0])
    with raised_by_all():  # rank 0 opens the run's metrics
        training = Training(config, engine, train, position, run.validation, stop, first_step, owes_evaluation)
    return training.run()


def _prepare_directory(config: Config, resumes: bool) -> None:
    """Writes what the run's directory says of the run, and removes what a job before left half-written. Raises
    OSError.
    """
    run_directory = Path(config.run.directory)
    write_config(config, run_directory / RESOLVED)
    if config.run.initial_weights and not resumes:
        write_special_ids(run_directory, open_initial_weights(config).special_ids)
    for leftover in remove_leftovers(run_directory):
        print_warning(f"{leftover} cannot be removed; it is of no use")


def _check_agreement(config: Config, num_tokens: list[int]) -> None:
    """Raises: InputError on all ranks if one has other settings or corpora, as from another node's script.
    Collective.
    """
    first, *others = of_all_ranks((config, num_tokens))
    for rank, other in enumerate(others, start=1):
        if other != first:
            found = next(iter(differences(first[0], other[0])), f"corpora of {first[1]} -> {other[1]} tokens")
            raise InputError(
                f"rank {rank} is not started as rank 0 is ({found}); expected the same arguments and corpora on all"
            )


def _leave_peers() -> None:
    """Closes the communicators of torch.distributed. Not after an error, which may be this rank's alone: peers may
    never come.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def entry() -> None:
    """The command line: an InputError becomes one line on stderr and exit status 2, once per node; Ctrl-C is status
    130.

    So does an OSError that the user can remedy.
    """
    outcome: list[int] = []
    atexit.register(_end, outcome)  # first of all, so that it is called last
    print_all_characters()
    ignore_deprecated_collectives()
    try:
        status = main(sys.argv[1:])
    except SystemExit as caught:
        status = caught.code if isinstance(caught.code, int) else int(bool(caught.code))
        if status:
            _wait_for_rank_0(RANK_0_SPEAKS_SECONDS)
    except KeyboardInterrupt:
        status = 130
    except (InputError, OSError) as caught:
        error = translate_os_error(caught)
        if not isinstance(error, InputError):
            raise
        with suppress(InputError):  # of the launcher's variables, which may be what is wrong
            local_rank = find_place().local_rank
            if local_rank != 0:
                _wait_for_rank_0(RANK_0_SPEAKS_SECONDS + local_rank)
        print_error(error)
        status = 2
    outcome.append(status)
    sys.exit(status)


def _wait_for_rank_0(seconds: float) -> None:
    """Gives rank 0 time to print the error; its launcher's SIGTERM then ends this rank, which has nothing more to
    save.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(seconds)


def _end(outcome: list[int]) -> None:
    """Ends the process with its exit status, if that is known, before Python takes itself apart.

    DeepSpeed's globals keep gloo's threads alive after destroy_process_group, and one that lets go of a collective's
    last tensor after that aborts the process (torch 2.11: ProcessGroupGloo::runLoop, decref_pyobject,
    PyEval_AcquireThread).
    """
    if outcome:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(outcome[0])


if __name__ == "__main__":
    entry()

"""Pretrains a multi-token model.

    deepspeed --module megamtp.pretrain configs/quickstart.yaml model.num_future_tokens=4 optimizer.lr=3e-4
    torchrun --nproc-per-node 8 -m megamtp.pretrain configs/1.3b_n4.yaml data.train=corpus/train run.directory=runs/1.3b
    python -m megamtp.pretrain configs/quickstart.yaml          (one rank)

Later arguments override earlier ones. A run directory that holds checkpoints is resumed, from the newest that is undamaged, with
any engine on any number of ranks.
"""

import atexit
import json
import os
import socket
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from megamtp.cluster.signals import StopRequest  # first: it looks for the launcher, which may die while torch is imported

# isort: split
import torch

from megamtp.checkpoint.hf_tokenizer import translate
from megamtp.checkpoint.special_ids import write_special_ids
from megamtp.checkpoint.state import read_state
from megamtp.checkpoint.store import Manifest, check_trained_model, checkpoints, remove_leftovers
from megamtp.cluster.environment import Place, emulated_place, find_place, of_all_ranks, raised_by_all, share_error
from megamtp.commands.command_line import ignore_deprecated_collectives, print_all_characters, print_error
from megamtp.config import RESOLVED, Config, differences, from_anywhere, print_help, read_config, write_config
from megamtp.data.corpus import SUMMARY
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.loader import TrainLoader
from megamtp.data.position import DataPosition, find_changes, new_position, read_position, resumed_position
from megamtp.data.tokenizer import ByteTokenizer, open_tokenizer
from megamtp.data.windows import Windows
from megamtp.engines.check import check_engine
from megamtp.engines.deepspeed.join import join_peers
from megamtp.engines.initial_weights import open_initial_weights, without_initial_weights
from megamtp.errors import CheckpointError, InputError, explained
from megamtp.files import take_lock
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import lacks_validation, records_until
from megamtp.training.resuming import newest_readable, newest_verified

FLOAT8_CAPABILITY = (8, 9)  # the first GPUs with fp8 products
RANK_0_SPEAKS_SECONDS = 10  # for it to say what is wrong; its launcher then ends the others, while they sleep
PROBE_BYTES = 65536  # that must fit before a run begins: a configuration and some metrics


@dataclass(frozen=True)
class CheckedRun:
    """A configuration whose inputs have all been checked: the rest needs peers and devices."""

    config: Config
    train: list[Windows]
    validation: Windows | None
    readers: tuple[int, int]  # data-parallel rank and size
    cut: Partition | SpreadPartition | None  # of a pipeline
    changes: list[str]  # of a resumed run's configuration, in words
    lock: TextIO | None  # held open by rank 0 as long as the job runs


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


def check(config: Config, place: Place) -> CheckedRun:
    """Looks at everything that can be wrong before peers are met; creates the run directory when nothing is.

    Raises:
        InputError: one line that says what is wrong.
    """
    readers, cut = check_engine(config, place.rank, place.world_size)
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("train.precision=fp16 without a GPU; expected fp32 or bf16: DeepSpeed's fp16 needs a GPU")
    if config.head_loss.precision == "fp8":
        _check_float8()
    if config.data.tokenizer:
        _check_tokenizer(config)
    train = [_windows(config, prefix) for _, prefix in config.data.train_corpora]
    validation = _windows(config, config.data.validation) if config.data.validation else None
    if validation:
        validation.check_first(config.run.evaluation_windows, place.rank, place.world_size)
    run_directory = Path(config.run.directory)
    if config.run.initial_weights and not checkpoints(run_directory):
        open_initial_weights(config)
    if config.cluster.emulate:
        _spare_real_run(run_directory)
    _make_writable(run_directory)
    lock = _lock(run_directory) if place.rank == 0 else None
    found = None if config.cluster.emulate else newest_readable(run_directory, check_files=place.rank == 0)
    if found:
        check_trained_model(*found, config.model)
    find_position(config, train, found)  # for what it refuses
    changes = []
    if place.rank == 0:
        records_until(run_directory / METRICS, found[1].step if found else 0)
        if found and (run_directory / RESOLVED).exists():
            changes = _changes(run_directory / RESOLVED, config)
    return CheckedRun(config, train, validation, readers, cut, changes, lock)


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
            print(f"{run_directory} has all its {config.train.steps} steps already; nothing to do")
        return True
    with raised_by_all():
        position, notes = find_position(config, run.train, found)
        blend = position.blend(run.train)
        train = TrainLoader(
            blend, config.global_batch_windows, config.train.micro_batch_size, *run.readers, first_step, position.windows
        )
        if place.rank == 0:
            _report_vocabulary(config)
    # Every weight of a resumed run is in its checkpoint; what it once started from may be gone.
    engine = build_engine(without_initial_weights(config) if found else config, run.cut)
    with raised_by_all():
        if place.rank == 0:
            at_end = position.advanced(blend, train.windows_before(config.train.steps))
            for line in (*run.changes, *notes, *at_end.passes(), *at_end.warnings()):
                print(line, flush=True)
            _prepare_directory(config, resumes=found is not None)
    torch.manual_seed((config.train.seed << 24) + place.rank)  # or checkpoints would differ in random states that nothing has used
    if found:
        engine.load(found[0])
    with raised_by_all():  # rank 0 opens the run's metrics
        training = Training(config, engine, train, position, run.validation, stop, first_step, owes_evaluation)
    return training.run()


def _prepare_directory(config: Config, resumes: bool) -> None:
    """Writes what the run's directory says of the run, and removes what a job before left half-written. Raises OSError."""
    run_directory = Path(config.run.directory)
    write_config(config, run_directory / RESOLVED)
    if config.run.initial_weights and not resumes:
        write_special_ids(run_directory, open_initial_weights(config).special_ids)
    for leftover in remove_leftovers(run_directory):
        print(f"megamtp: warning: {leftover} cannot be removed; it is of no use", file=sys.stderr, flush=True)


def find_position(config: Config, corpora: list[Windows], found: tuple[Path, Manifest] | None) -> tuple[DataPosition, list[str]]:
    """Where the run starts to read, or goes on after the checkpoint `found`, and lines that say so where it is not obvious.

    Raises:
        InputError: the windows differ from those of the run so far, and data.accept_changes is not set.
    """
    weights = [weight for weight, _ in config.data.train_corpora]
    if not found:
        return new_position(corpora, weights), []
    checkpoint, manifest = found
    data = read_state(manifest.state, checkpoint).data
    if data is None:
        windows = manifest.step * config.global_batch_windows
        line = f"{checkpoint} does not say which windows it was trained on: {manifest.step} steps of the present size are assumed"
        position = new_position(corpora, weights)
        return position.advanced(position.blend(corpora), windows), [line]
    saved = read_position(data, checkpoint)
    changes = find_changes(saved, corpora, weights)
    if not changes:
        return saved, []
    if not config.data.accept_changes:
        raise InputError(
            f"{checkpoint}: {'; '.join(changes)}; expected the windows of the run so far: change it back, or set "
            "data.accept_changes=true to go on with new windows"
        )
    return resumed_position(saved, corpora, weights)


def _check_agreement(config: Config, num_tokens: list[int]) -> None:
    """Raises: InputError on all ranks if one has other settings or corpora, as from another node's script. Collective."""
    first, *others = of_all_ranks((config, num_tokens))
    for rank, other in enumerate(others, start=1):
        if other != first:
            found = next(iter(differences(first[0], other[0])), f"corpora of {first[1]} -> {other[1]} tokens")
            raise InputError(f"rank {rank} is not started as rank 0 is ({found}); expected the same arguments and corpora on all")


def _leave_peers() -> None:
    """Closes the communicators of torch.distributed. Not after an error, which may be this rank's alone: peers may never come."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _windows(config: Config, prefix: str) -> Windows:
    _check_vocabulary(config, Path(prefix).parent / SUMMARY)
    windows = Windows(
        IndexedDataset(prefix), config.train.sequence_length, config.model.num_future_tokens, config.train.seed,
        vocab_size=config.model.vocab_size, documents=config.data.documents,
    )  # fmt: skip
    windows.check_ends()
    return windows


def _check_vocabulary(config: Config, summary: Path) -> None:
    """The tokenizer that a corpus was made with, as far as its summary, if there is one, tells."""
    found, model, tokenizer = _prepared_vocabulary(summary), config.model.vocab_size, config.data.tokenizer
    if found is None:
        return
    if found > model:
        limit = f"model.vocab_size is {model}; expected no more"
    elif tokenizer and found != _num_pieces(tokenizer):
        limit = f"{tokenizer} has {_num_pieces(tokenizer)} pieces; expected the same"
    else:
        return
    raise InputError(
        f"{summary} tells of a vocabulary of {found}, {limit}: the corpus was made with another tokenizer than the model's"
    )


def _prepared_vocabulary(summary: Path) -> int | None:
    """The vocabulary in a corpus's summary; None for a corpus of another program."""
    try:
        return int(json.loads(summary.read_text())["vocab_size"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _report_vocabulary(config: Config) -> None:
    """Prints how many rows of the model no token uses, and warns of a tokenizer that cannot be exported."""
    tokenizer, rows = config.data.tokenizer, config.model.vocab_size
    if tokenizer:
        used = _num_pieces(tokenizer)
    else:
        prepared = [_prepared_vocabulary(Path(prefix).parent / SUMMARY) for _, prefix in config.data.train_corpora]
        known = [pieces for pieces in prepared if pieces is not None]
        used = max(known) if len(known) == len(prepared) else rows
    if used < rows:
        unused = rows - used
        print(f"model.vocab_size is {rows}, the tokenizer has {used} pieces: {unused} more rows, part of every softmax", flush=True)
    if tokenizer and not isinstance(opened := open_tokenizer(tokenizer), ByteTokenizer):
        try:
            translate(opened)
        except CheckpointError as error:
            print(f"megamtp: warning: the model can be trained; {error}", file=sys.stderr, flush=True)


def _check_float8() -> None:
    if not torch.cuda.is_available():
        found = "without a GPU"
    elif torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        found = f"on {torch.cuda.get_device_name()}"
    else:
        return
    raise InputError(f"head_loss.precision=fp8 {found}; expected one that multiplies fp8 (H100, H200 or later): leave it null")


def _check_tokenizer(config: Config) -> None:
    found = _num_pieces(config.data.tokenizer)
    if found > config.model.vocab_size:
        raise InputError(
            f"{config.data.tokenizer} has {found} pieces, model.vocab_size is {config.model.vocab_size}; expected as many or more: "
            f"set model.vocab_size={found} or choose the model's tokenizer"
        )


@lru_cache
def _num_pieces(tokenizer: str) -> int:
    return open_tokenizer(tokenizer).vocab_size


def _make_writable(directory: Path) -> None:
    try:
        for name in ("checkpoints", "tensorboard"):
            if (folder := directory / name).exists() and not folder.is_dir():
                raise InputError(f"{folder} is a file; expected a folder: choose another run.directory, or move the file away")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(PROBE_BYTES))
    except OSError as error:
        raise InputError(f"{directory} cannot be written to: {error.strerror}; choose another run.directory") from None


def _spare_real_run(directory: Path) -> None:
    resolved = directory / RESOLVED
    if checkpoints(directory) or (os.path.exists(resolved) and read_config([str(resolved)]).cluster.emulate is None):
        raise InputError(
            f"{directory} holds a real run, whose metrics those of cluster.emulate would replace; choose another run.directory"
        )


def _changes(path: Path, config: Config) -> list[str]:
    try:
        return [f"changed since the run began: {one}" for one in differences(read_config([str(path)]), from_anywhere(config))]
    except InputError as error:  # it is about to be written anew
        return [f"what has changed since the run began is not known: {error}"]


def _lock(directory: Path) -> TextIO:
    """Makes sure that no other job writes there; the system lets go of the lock when the process ends, however it ends.

    Raises:
        InputError: another job has it.
    """
    path = directory / "lock"
    try:
        owner = open(path, "a+")  # noqa: SIM115 - open as long as the job runs
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; expected a file of your own: remove it, or choose another run.directory"
        ) from None
    if not take_lock(owner, path, "see to it that no other job uses it"):
        owner.seek(0)
        raise InputError(
            f"{directory} belongs to a running job ({owner.read().strip()}); stop that one, or choose another run.directory"
        )
    owner.truncate(0)
    owner.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    owner.flush()
    return owner


def entry() -> None:
    """The command line: an InputError becomes one line on stderr and exit status 2, once per node; Ctrl-C is status 130.

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
            time.sleep(RANK_0_SPEAKS_SECONDS)
    except KeyboardInterrupt:
        status = 130
    except (InputError, OSError) as caught:
        error = explained(caught)
        if not isinstance(error, InputError):
            raise
        with suppress(InputError):  # of the launcher's variables, which may be what is wrong
            local_rank = find_place().local_rank
            if local_rank != 0:
                time.sleep(RANK_0_SPEAKS_SECONDS + local_rank)
        print_error(error)
        status = 2
    outcome.append(status)
    sys.exit(status)


def _end(outcome: list[int]) -> None:
    """Ends the process with its exit status, if that is known, before Python takes itself apart.

    DeepSpeed's globals keep gloo's threads alive after destroy_process_group, and one that lets go of a collective's last tensor
    after that aborts the process (torch 2.11: ProcessGroupGloo::runLoop, decref_pyobject, PyEval_AcquireThread).
    """
    if outcome:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(outcome[0])


if __name__ == "__main__":
    entry()

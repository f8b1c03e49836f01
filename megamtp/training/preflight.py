"""Checks settings, corpora, tokenizer and run directory before torch.distributed is initialised or a GPU is used."""

import json
import os
import socket
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import torch

from megamtp.checkpoint.hf_tokenizer import translate
from megamtp.checkpoint.state import read_state
from megamtp.checkpoint.store import Manifest, check_trained_model, checkpoints
from megamtp.cluster.environment import Place
from megamtp.config import RESOLVED, Config, differences, read_config, with_absolute_paths
from megamtp.console import print_line, print_warning
from megamtp.data.corpus import SUMMARY
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.position import DataPosition, find_changes, new_position, read_position, resumed_position
from megamtp.data.tokenizer import ByteTokenizer, open_tokenizer
from megamtp.data.windows import Windows
from megamtp.engines.check import check_engine
from megamtp.engines.initial_weights import open_initial_weights
from megamtp.errors import CheckpointError, InputError
from megamtp.files import take_lock
from megamtp.planning.partition import Partition
from megamtp.planning.precision_choice import describe_slow_float8
from megamtp.planning.spread import SpreadPartition
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import records_until
from megamtp.training.resuming import newest_readable

FLOAT8_CAPABILITY = (8, 9)  # compute capability of the first GPUs with fp8 products
PROBE_BYTES = 65536  # these must fit on the disk when a job starts: a configuration and some metrics


@dataclass(frozen=True)
class CheckedRun:
    """A configuration and its opened inputs, all checked."""

    config: Config
    train: list[Windows]
    validation: Windows | None
    data_parallel_rank_and_size: tuple[int, int]
    partition: Partition | SpreadPartition | None  # the stages of a pipeline
    changes: list[str]  # lines about settings that differ from the previous job's
    lock: TextIO | None  # open on rank 0 while the job runs


def check(config: Config, place: Place) -> CheckedRun:
    """Checks everything that needs no peers. Also creates the run directory, and locks it on rank 0.

    Raises:
        InputError: the first mistake.
    """
    data_parallel_rank_and_size, partition = check_engine(config, place.rank, place.world_size)
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("train.precision=fp16 without a GPU; expected fp32, bf16 or fp8: DeepSpeed's fp16 needs a GPU")
    if config.train.cuda_graphs and not torch.cuda.is_available():
        raise InputError("train.cuda_graphs=true without a GPU; expected false")
    if "fp8" in (config.train.precision, config.resolved_head_loss.precision):
        _check_float8(config, place)
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
        _refuse_run_without_emulation(run_directory)
    _make_writable(run_directory)
    lock = _lock(run_directory) if place.rank == 0 else None
    newest = None if config.cluster.emulate else newest_readable(run_directory, check_files=place.rank == 0)
    if newest:
        check_trained_model(*newest, config.model)
    find_position(config, train, newest)  # raises InputError if the windows have changed
    changes = []
    if place.rank == 0:
        records_until(run_directory / METRICS, newest[1].step if newest else 0)
        if newest and (run_directory / RESOLVED).exists():
            changes = _changes(run_directory / RESOLVED, config)
    return CheckedRun(config, train, validation, data_parallel_rank_and_size, partition, changes, lock)


def find_position(
    config: Config, corpora: list[Windows], newest: tuple[Path, Manifest] | None
) -> tuple[DataPosition, list[str]]:
    """Returns the position in the data at which the run continues, and lines that explain it to the user.

    Args:
        newest: the checkpoint from which the run resumes, and its manifest; None in a new run.

    Raises:
        InputError: the windows differ from the previous job's, and data.accept_changes is not set.
    """
    weights = [weight for weight, _ in config.data.train_corpora]
    if newest is None:
        return new_position(corpora, weights), []
    checkpoint, manifest = newest
    data = read_state(manifest.state, checkpoint).data
    if data is None:
        position = new_position(corpora, weights)
        windows = manifest.step * config.global_batch_windows
        return position.advanced(position.blend(corpora), windows), [
            f"{checkpoint} does not say on which windows it was trained: {manifest.step} steps of {windows} windows in "
            "all are assumed"
        ]
    saved = read_position(data, checkpoint)
    changes = find_changes(saved, corpora, weights)
    if not changes:
        return saved, []
    if not config.data.accept_changes:
        raise InputError(
            f"{checkpoint}: {'; '.join(changes)}; expected the windows of the run so far: change it back, or set "
            "data.accept_changes=true to continue with new windows"
        )
    return resumed_position(saved, corpora, weights)


def _windows(config: Config, prefix: str) -> Windows:
    _check_vocabulary(config, Path(prefix).parent / SUMMARY)
    windows = Windows(
        IndexedDataset(prefix),
        config.train.sequence_length,
        config.model.num_future_tokens,
        config.train.seed,
        vocab_size=config.model.vocab_size,
        documents=config.data.documents,
    )
    windows.check_ends()
    return windows


def _check_vocabulary(config: Config, summary: Path) -> None:
    """Raises InputError if the vocabulary in the corpus's summary does not fit the model or its tokenizer."""
    prepared, rows, tokenizer = _prepared_vocabulary(summary), config.model.vocab_size, config.data.tokenizer
    if prepared is None:
        return
    if prepared > rows:
        limit = f"model.vocab_size is {rows}; expected no more"
    elif tokenizer and prepared != _num_pieces(tokenizer):
        limit = f"{tokenizer} has {_num_pieces(tokenizer)} pieces; expected the same"
    else:
        return
    raise InputError(
        f"{summary} has a vocabulary of {prepared}, {limit}: prepare the corpus with the model's tokenizer, or set "
        "model.vocab_size and data.tokenizer to the corpus's"
    )


def _prepared_vocabulary(summary: Path) -> int | None:
    """Returns the vocabulary size in a corpus's summary; None if another program made the corpus."""
    try:
        return int(json.loads(summary.read_text())["vocab_size"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def report_vocabulary(config: Config) -> None:
    """Prints how many rows of the embeddings belong to no token, and warns if the tokenizer cannot be exported."""
    tokenizer, rows = config.data.tokenizer, config.model.vocab_size
    if tokenizer:
        used = _num_pieces(tokenizer)
    else:
        prepared = [_prepared_vocabulary(Path(prefix).parent / SUMMARY) for _, prefix in config.data.train_corpora]
        known = [pieces for pieces in prepared if pieces is not None]
        used = max(known) if len(known) == len(prepared) else rows
    if used < rows:
        print_line(
            f"model.vocab_size is {rows}, the tokenizer has {used} pieces: {rows - used} rows have no token; they are "
            "part of every softmax"
        )
    if tokenizer and not isinstance(opened := open_tokenizer(tokenizer), ByteTokenizer):
        try:
            translate(opened)
        except CheckpointError as error:
            print_warning(f"training works, but {error}")


def _check_float8(config: Config, place: Place) -> None:
    """Warns on rank 0 if fp8 is slow here. Raises InputError on a GPU without fp8 products."""
    fp8 = "train.precision=fp8" if config.train.precision == "fp8" else "head_loss.precision=fp8"
    if not torch.cuda.is_available():
        if place.rank == 0:
            print_warning(f"{fp8} without a GPU: fp8 products are emulated, slowly")
    elif torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        raise InputError(
            f"{fp8} on {torch.cuda.get_device_name()}; expected a GPU with fp8 products (Ada, Hopper or later): set it "
            "to bf16"
        )
    elif place.rank == 0:
        warning = describe_slow_float8(config, place.world_size, torch.cuda.get_device_name())
        if warning:
            print_warning(warning)


def _check_tokenizer(config: Config) -> None:
    num_pieces = _num_pieces(config.data.tokenizer)
    if num_pieces > config.model.vocab_size:
        raise InputError(
            f"{config.data.tokenizer} has {num_pieces} pieces, model.vocab_size is {config.model.vocab_size}; expected "
            f"as many rows or more: set model.vocab_size={num_pieces}, or choose the model's tokenizer"
        )


@lru_cache
def _num_pieces(tokenizer: str) -> int:
    return open_tokenizer(tokenizer).vocab_size


def _make_writable(directory: Path) -> None:
    try:
        for name in ("checkpoints", "tensorboard"):
            if (folder := directory / name).exists() and not folder.is_dir():
                raise InputError(
                    f"{folder} is a file; expected a folder: choose another run.directory, or move the file away"
                )
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(PROBE_BYTES))
    except OSError as error:
        raise InputError(f"{directory} cannot be written to: {error.strerror}; choose another run.directory") from None


def _refuse_run_without_emulation(directory: Path) -> None:
    resolved = directory / RESOLVED
    if checkpoints(directory) or (os.path.exists(resolved) and read_config([str(resolved)]).cluster.emulate is None):
        raise InputError(
            f"{directory} holds a run without cluster.emulate; expected an empty folder, because its metrics would be "
            "overwritten: "
            "choose another run.directory"
        )


def _changes(path: Path, config: Config) -> list[str]:
    try:
        return [
            f"changed since the run began: {change}"
            for change in differences(read_config([str(path)]), with_absolute_paths(config))
        ]
    except InputError as error:  # the file will be written again
        return [f"the run's settings cannot be compared with the earlier ones: {error}"]


def _lock(directory: Path) -> TextIO:
    """Locks the run directory. The system releases the lock when the process ends, even if it is killed.

    Raises:
        InputError: another job holds the lock, or the lock file cannot be opened.
    """
    path = directory / "lock"
    try:
        owner = open(path, "a+")  # noqa: SIM115 - open while the job runs
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; expected a file that you own: remove it, or choose another run.directory"
        ) from None
    if not take_lock(owner, path, "make sure that no other job uses it"):
        owner.seek(0)
        raise InputError(
            f"{directory} belongs to a running job ({owner.read().strip()}); stop that job, or choose another "
            "run.directory"
        )
    owner.truncate(0)
    owner.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    owner.flush()
    return owner

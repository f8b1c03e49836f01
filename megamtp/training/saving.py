"""Writes checkpoints while training continues. Training pauses only to copy the state to CPU memory.

    training   begin: copy the state │ step │ step │ ... │ finish: rank 0 publishes the checkpoint
    thread                           │ write and sync this rank's file │

The all-reduce at the end of each step (loop.py) counts the ranks that have written. Training calls `finish` when all
have, so no rank waits for the slowest disk.

Tests: tests/distributed/test_saving.py.
"""

import dataclasses
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor

from megamtp.checkpoint import store
from megamtp.checkpoint.shards import Snapshot, shard_name, write_shard
from megamtp.checkpoint.slices import SLICES, FileSlices, WrittenFile, file_slices, write_slices
from megamtp.checkpoint.tensors import InMemory
from megamtp.cluster.environment import of_all_ranks
from megamtp.config import Config
from megamtp.console import print_warning
from megamtp.engines.base import Engine, EngineState
from megamtp.errors import REMEDIES, CheckpointError
from megamtp.training.metrics import Metrics


@dataclass
class _PendingCheckpoint:
    """A checkpoint that this rank's thread is writing. The thread sets `file` or `error`, and `write_seconds`."""

    manifest: store.Manifest
    slices: FileSlices
    copy_seconds: float
    thread: threading.Thread = dataclasses.field(init=False)
    file: WrittenFile | None = None
    error: str | None = None
    write_seconds: float = 0.0


class Saver:
    """Saves the state of one engine on all ranks. `begin` and `finish` are collective."""

    def __init__(self, config: Config, engine: Engine, metrics: Metrics):
        self._config, self._engine, self._metrics = config, engine, metrics
        self._directory = Path(config.run.directory)
        self._snapshot = Snapshot()
        self._pending: _PendingCheckpoint | None = None
        self._removal_thread: threading.Thread | None = None

    @property
    def has_written(self) -> bool:
        """Whether a checkpoint is pending and this rank's thread has ended. Its file is on disk, or writing failed."""
        return self._pending is not None and not self._pending.thread.is_alive()

    def begin(self, step: int, data_position: dict[str, Any]) -> None:
        """Copies the state after `step` steps and starts to write it; finishes a pending checkpoint first. Collective.

        Args:
            data_position: as DataPosition.to_json returns it.

        Raises:
            CheckpointError: the pending checkpoint could not be written, or the disk has no room for this checkpoint.
        """
        self.finish()
        start = time.perf_counter()
        with self._metrics.phase("save"):
            state = self._engine.state()
            self._make_partial_folder(
                step, sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
            )
            tensors = self._snapshot.copy(state.tensors)
        config = self._config
        manifest = store.Manifest(
            step,
            self._engine.world_size,
            config.engine.kind,
            config.train.precision,
            dataclasses.asdict(config.model),
            dataclasses.replace(state.run, data=data_position).to_json(),
        )
        slices = file_slices(InMemory(state.tensors), state.shapes)
        pending = self._pending = _PendingCheckpoint(manifest, slices, time.perf_counter() - start)
        pending.thread = threading.Thread(target=self._write, args=(pending, tensors, state), name="megamtp-save")
        pending.thread.start()

    def finish(self) -> None:
        """Waits until the pending checkpoint, if any, is written by all ranks and published. Collective.

        Raises:
            CheckpointError: a rank could not write its file, for example because a disk is full. Older checkpoints
                are untouched.
        """
        pending, self._pending = self._pending, None
        if not pending:
            return
        start = time.perf_counter()
        with self._metrics.phase("save"):
            pending.thread.join()
            results = of_all_ranks(_WriteResult(pending.file, pending.error, pending.write_seconds))
            error = next((result.error for result in results if result.error), None)
            slices = None if error else self._collect_slices(pending.slices)
            outcome = [error or (self._publish(pending.manifest, results, slices) if slices else None)]
            dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:
            self._abandon(pending.manifest.step, outcome[0])
        wait_seconds = time.perf_counter() - start
        stored_bytes = sum(result.file.bytes for result in results if result.file)
        write_seconds = max(result.seconds for result in results)
        self._metrics.report_checkpoint(
            pending.manifest.step, stored_bytes, write_seconds, pending.copy_seconds, wait_seconds
        )

    def _make_partial_folder(self, step: int, num_bytes: int) -> None:
        """Creates the folder for the files and checks that the files of all ranks fit on its disk. Collective.

        The check comes before any rank writes, because a full disk would stop all other programs, too. Raises
        CheckpointError on all ranks or on none.
        """
        if self._removal_thread:  # only rank 0 removes checkpoints, and the free space that rank 0 reads is compared
            self._removal_thread.join()
        partial, free_bytes, error = self._partial(step), 0, None
        try:
            partial.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(partial).free
        except OSError as problem:
            error = self._write_error(step, problem)
        reports = of_all_ranks((num_bytes, free_bytes, error))
        needed_bytes, free_bytes = sum(size for size, _, _ in reports), reports[0][1]
        error = next((error for _, _, error in reports if error), None)
        if not error and free_bytes < needed_bytes:
            error = self._write_error(step, f"it needs {needed_bytes:,} bytes, {free_bytes:,} are free")
        if error:
            self._abandon(step, error)

    def _write(self, pending: _PendingCheckpoint, tensors: dict[str, Tensor], state: EngineState) -> None:
        """Writes this rank's file. Runs in the thread."""
        start, step = time.perf_counter(), pending.manifest.step
        try:
            pending.file = write_shard(
                self._partial(step) / shard_name(self._engine.rank), InMemory(tensors), state.shapes
            )
        except Exception as error:
            pending.error = self._write_error(step, error)  # any exception: the other ranks must not wait for this file
            if not isinstance(error, OSError):
                raise
        pending.write_seconds = time.perf_counter() - start

    def _collect_slices(self, own: FileSlices) -> list[FileSlices] | None:
        """Returns the slices in each rank's file on rank 0, and None on other ranks. Collective."""
        slices = [own] * self._engine.world_size if self._engine.rank == 0 else None
        dist.gather_object(own, slices)
        return slices

    def _publish(self, manifest: store.Manifest, results: list["_WriteResult"], slices: list[FileSlices]) -> str | None:
        """Publishes a checkpoint and starts to remove outdated checkpoints. Rank 0 only. Returns an error or None."""
        checkpoint = store.checkpoint_path(self._directory, manifest.step)
        try:
            index = write_slices(
                store.partial_path(checkpoint) / SLICES, {shard_name(rank): own for rank, own in enumerate(slices)}
            )
            files = {shard_name(rank): result.file for rank, result in enumerate(results) if result.file}
            store.publish(checkpoint, manifest, files | {SLICES: index})
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return self._write_error(manifest.step, error)
        thread = threading.Thread(target=self._remove_outdated, args=(manifest.step,), name="megamtp-remove")
        self._removal_thread = thread
        thread.start()
        return None

    def _remove_outdated(self, step: int) -> None:
        """Removes outdated checkpoints. Runs in another thread on rank 0. A failure is harmless and only printed."""
        run = self._config.run
        for checkpoint in store.find_outdated(self._directory, step, run.keep_checkpoints, run.keep_every_steps):
            try:
                store.remove(checkpoint)
            except OSError as error:
                print_warning(f"{checkpoint} cannot be removed: {error.strerror}")

    def _abandon(self, step: int, error: str) -> NoReturn:
        """Removes the partial checkpoint, which would fill the disk, and raises CheckpointError on every rank."""
        if self._engine.rank == 0:
            shutil.rmtree(self._partial(step), ignore_errors=True)
        raise CheckpointError(error)

    def _partial(self, step: int) -> Path:
        return store.partial_path(store.checkpoint_path(self._directory, step))

    def _write_error(self, step: int, reason: Exception | str) -> str:
        """Returns a message about a failed write. A `reason` of type str always means that the disk is too full."""
        checkpoint, problem, remedy = store.checkpoint_path(self._directory, step), reason, "make room"
        if isinstance(reason, OSError):
            problem, remedy = reason.strerror or reason, REMEDIES.get(reason.errno or 0, "check the disk")
        elif isinstance(reason, Exception):
            remedy = "check the disk"
        return (
            f"{checkpoint} cannot be written ({problem}); {remedy}, and start the job again: it resumes from the "
            "previous checkpoint"
        )


@dataclass(frozen=True)
class _WriteResult:
    """The outcome of one rank's write, exchanged among all ranks."""

    file: WrittenFile | None
    error: str | None
    seconds: float

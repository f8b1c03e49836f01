"""Checkpoints written while training goes on: it stops only for the copy of the state in CPU memory.

    begin: copy | thread: write and sync this rank's file | ... steps ... | all ranks have written: rank 0 publishes

Ranks learn from each step's report (loop.py) that all have written, so nothing waits for the slowest disk.

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
class _Writing:
    """A checkpoint on its way. The thread sets `file` or `error`."""

    manifest: store.Manifest
    slices: FileSlices
    copy_seconds: float
    thread: threading.Thread = dataclasses.field(init=False)
    file: WrittenFile | None = None
    error: str | None = None
    seconds: float = 0.0


class Saver:
    """Saves one engine's state on all ranks. `begin` and `finish` are collective."""

    def __init__(self, config: Config, engine: Engine, metrics: Metrics):
        self._config, self._engine, self._metrics = config, engine, metrics
        self._directory = Path(config.run.directory)
        self._snapshot = Snapshot()
        self._writing: _Writing | None = None
        self._removal: threading.Thread | None = None

    @property
    def has_written(self) -> bool:
        """A checkpoint is on its way, and this rank's part of it is on disk, or has failed."""
        return self._writing is not None and not self._writing.thread.is_alive()

    def begin(self, step: int, data_position: dict[str, Any]) -> None:
        """Copies the state after `step` steps and returns; a checkpoint that is still on its way is finished first.

        Args:
            data_position: as DataPosition.to_json returns it.

        Raises:
            CheckpointError: that one could not be written, or there is no room for this one.
        """
        self.finish()
        start = time.perf_counter()
        with self._metrics.phase("save"):
            state = self._engine.state()
            self._make_folder(step, sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values()))
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
        writing = self._writing = _Writing(
            manifest, file_slices(InMemory(state.tensors), state.shapes), time.perf_counter() - start
        )
        writing.thread = threading.Thread(target=self._write, args=(writing, tensors, state), name="megamtp-save")
        writing.thread.start()

    def finish(self) -> None:
        """Waits until the checkpoint on its way, if there is one, is visible.

        Raises:
            CheckpointError: any rank could not write it, as when a disk is full; older checkpoints are untouched.
        """
        writing, self._writing = self._writing, None
        if not writing:
            return
        start = time.perf_counter()
        with self._metrics.phase("save"):
            writing.thread.join()
            parts = of_all_ranks(_Part(writing.file, writing.error, writing.seconds))
            error = next((part.error for part in parts if part.error), None)
            slices = None if error else self._on_rank_0(writing.slices)
            outcome = [error or (self._publish(writing.manifest, parts, slices) if slices else None)]
            dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:
            self._abandon(writing.manifest.step, outcome[0])
        waited = time.perf_counter() - start
        total = sum(part.file.bytes for part in parts if part.file)
        self._metrics.checkpoint(
            writing.manifest.step, total, max(part.seconds for part in parts), writing.copy_seconds, waited
        )

    def _make_folder(self, step: int, num_bytes: int) -> None:
        """Sees to it that all ranks' parts fit together, before any is written: a full disk is in the way of everything
        else, too.

        All ranks raise, or none. Collective.
        """
        if self._removal:  # rank 0's, and what it sees is free counts
            self._removal.join()
        partial, free, error = self._partial(step), 0, None
        try:
            partial.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(partial).free
        except OSError as found:
            error = self._failure(step, found)
        told = of_all_ranks((num_bytes, free, error))
        needed, free = sum(size for size, _, _ in told), told[0][1]
        error = next((error for _, _, error in told if error), None)
        if not error and free < needed:
            error = self._failure(step, f"it needs {needed:,} bytes, {free:,} are free")
        if error:
            self._abandon(step, error)

    def _write(self, writing: _Writing, tensors: dict[str, Tensor], state: EngineState) -> None:
        """The thread's work: this rank's file."""
        start, step = time.perf_counter(), writing.manifest.step
        try:
            writing.file = write_shard(
                self._partial(step) / shard_name(self._engine.rank), InMemory(tensors), state.shapes
            )
        except Exception as error:
            writing.error = self._failure(step, error)  # whatever it is, the other ranks must not wait for this one
            if not isinstance(error, OSError):
                raise
        writing.seconds = time.perf_counter() - start

    def _on_rank_0(self, own: FileSlices) -> list[FileSlices] | None:
        """What each rank's file has, on rank 0; None on others. Collective."""
        found = [own] * self._engine.world_size if self._engine.rank == 0 else None
        dist.gather_object(own, found)
        return found

    def _publish(self, manifest: store.Manifest, parts: list["_Part"], slices: list[FileSlices]) -> str | None:
        """Rank 0's: what went wrong, or None."""
        checkpoint = store.checkpoint_path(self._directory, manifest.step)
        try:
            index = write_slices(
                store.partial_path(checkpoint) / SLICES, {shard_name(rank): own for rank, own in enumerate(slices)}
            )
            files = {shard_name(rank): part.file for rank, part in enumerate(parts) if part.file}
            store.publish(checkpoint, manifest, files | {SLICES: index})
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return self._failure(manifest.step, error)
        self._removal = threading.Thread(target=self._remove_outdated, args=(manifest.step,), name="megamtp-remove")
        self._removal.start()
        return None

    def _remove_outdated(self, step: int) -> None:
        """Another thread's work, on rank 0. What cannot be removed is in nobody's way."""
        run = self._config.run
        for checkpoint in store.find_outdated(self._directory, step, run.keep_checkpoints, run.keep_every_steps):
            try:
                store.remove(checkpoint)
            except OSError as error:
                print_warning(f"{checkpoint} cannot be removed: {error.strerror}")

    def _abandon(self, step: int, error: str) -> NoReturn:
        if self._engine.rank == 0:  # what is left of it fills the disk
            shutil.rmtree(self._partial(step), ignore_errors=True)
        raise CheckpointError(error)

    def _partial(self, step: int) -> Path:
        return store.partial_path(store.checkpoint_path(self._directory, step))

    def _failure(self, step: int, reason: Exception | str) -> str:
        """A failed write in one line. `reason`: the exception; or, in words, what there is no room for."""
        checkpoint, problem, remedy = store.checkpoint_path(self._directory, step), reason, "make room"
        if isinstance(reason, OSError):
            problem, remedy = reason.strerror or reason, REMEDIES.get(reason.errno or 0, "see to the disk")
        elif isinstance(reason, Exception):
            remedy = "see to the disk"
        return (
            f"{checkpoint} cannot be written ({problem}); {remedy}, and start the job again: it goes on from the "
            "checkpoint before"
        )


@dataclass(frozen=True)
class _Part:
    """What the ranks tell each other of a checkpoint."""

    file: WrittenFile | None
    error: str | None
    seconds: float

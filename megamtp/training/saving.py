"""Checkpoints written while training goes on: it stops only for the copy of the state in CPU memory.

    begin: copy | thread: write and sync this rank's file | ... steps ... | all ranks have written: rank 0 publishes

Ranks learn from each step's report (loop.py) that all have written, so nothing waits for the slowest disk.
"""

import dataclasses
import errno
import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megamtp.checkpoint import store
from megamtp.checkpoint.shards import Snapshot, WrittenFile, shard_name, write_shard
from megamtp.checkpoint.tensors import InMemory
from megamtp.config import Config
from megamtp.engines.base import Engine, EngineState
from megamtp.errors import CheckpointError
from megamtp.training.metrics import Metrics


@dataclass
class _Writing:
    """A checkpoint on its way. The thread sets `file` or `error`."""

    manifest: store.Manifest
    stall_seconds: float
    thread: threading.Thread | None = None
    file: WrittenFile | None = None
    error: str | None = None
    seconds: float = 0.0


class Saver:
    """Saves one engine's state on all ranks. `begin` and `finish` are collective."""

    def __init__(self, config: Config, engine: Engine, metrics: Metrics):
        self._config, self._engine, self._metrics = config, engine, metrics
        self._directory = Path(config.run.directory)
        self._snapshot, self._writing = Snapshot(), None
        self._removal: threading.Thread | None = None

    @property
    def has_written(self) -> bool:
        """A checkpoint is on its way, and this rank's part of it is on disk, or has failed."""
        return self._writing is not None and not self._writing.thread.is_alive()

    def begin(self, step: int) -> None:
        """Copies the state after `step` steps and returns; a checkpoint that is still on its way is finished first.

        Raises:
            CheckpointError: that one could not be written.
        """
        self.finish()
        start = time.perf_counter()
        with self._metrics.phase("save"):
            state = self._engine.state()
            tensors = self._snapshot.take(state.tensors)
        config = self._config
        manifest = store.Manifest(
            step,
            self._engine.world_size,
            config.engine.kind,
            config.train.precision,
            dataclasses.asdict(config.model),
            state.run,
        )
        writing = self._writing = _Writing(manifest, time.perf_counter() - start)
        writing.thread = threading.Thread(target=self._write, args=(writing, tensors, state), name="megamtp-save")
        writing.thread.start()

    def finish(self) -> None:
        """Waits until the checkpoint on its way, if there is one, is visible.

        Raises:
            CheckpointError: any rank could not write it, as when a disk is full; older checkpoints are untouched.
        """
        if self._removal:
            self._removal.join()
        writing, self._writing = self._writing, None
        if not writing:
            return
        start = time.perf_counter()
        with self._metrics.phase("save"):
            writing.thread.join()
            parts: list[_Part] = [None] * self._engine.world_size
            dist.all_gather_object(parts, _Part(writing.file, writing.error, writing.seconds))
            error = next((part.error for part in parts if part.error), None)
            outcome = [error or (self._publish(writing.manifest, parts) if self._engine.rank == 0 else None)]
            dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:
            if self._engine.rank == 0:  # what is left of it fills the disk
                shutil.rmtree(store.partial_of(store.folder_of(self._directory, writing.manifest.step)), ignore_errors=True)
            raise CheckpointError(outcome[0])
        stall = writing.stall_seconds + time.perf_counter() - start
        total = sum(part.file.bytes for part in parts)
        self._metrics.checkpoint(writing.manifest.step, total, max(part.seconds for part in parts), stall)

    def _write(self, writing: _Writing, tensors: dict[str, Tensor], state: EngineState) -> None:
        """The thread's work: this rank's file."""
        start = time.perf_counter()
        partial = store.partial_of(store.folder_of(self._directory, writing.manifest.step))
        path = partial / shard_name(self._engine.rank)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(partial).free < sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            writing.file = write_shard(path, InMemory(tensors), state.shapes)
        except OSError as error:
            path.unlink(missing_ok=True)  # what remains of it would fill the disk for others
            writing.error = self._failure(writing.manifest, error)
        writing.seconds = time.perf_counter() - start

    def _publish(self, manifest: store.Manifest, parts: list["_Part"]) -> str | None:
        """Rank 0's: what went wrong, or None."""
        checkpoint = store.folder_of(self._directory, manifest.step)
        try:
            store.publish(checkpoint, manifest, {shard_name(rank): part.file for rank, part in enumerate(parts)})
        except OSError as error:
            return self._failure(manifest, error)
        run = self._config.run
        outdated = store.outdated(self._directory, manifest.step, run.keep_checkpoints, run.keep_every_steps)
        self._removal = threading.Thread(target=_remove, args=(outdated,), name="megamtp-remove")
        self._removal.start()
        return None

    def _failure(self, manifest: store.Manifest, error: OSError) -> str:
        checkpoint, free = store.folder_of(self._directory, manifest.step), shutil.disk_usage(self._directory).free
        return (
            f"{checkpoint} cannot be written ({error.strerror or error}); {free:,} bytes are free there: make room, and start the "
            "job again: it goes on from the checkpoint before"
        )


@dataclass(frozen=True)
class _Part:
    """What the ranks tell each other of a checkpoint."""

    file: WrittenFile | None
    error: str | None
    seconds: float


def _remove(outdated: list[Path]) -> None:
    for checkpoint in outdated:
        try:
            store.remove(checkpoint)
        except OSError as error:
            print(f"megamtp: warning: {checkpoint} cannot be removed: {error.strerror}", file=sys.stderr, flush=True)

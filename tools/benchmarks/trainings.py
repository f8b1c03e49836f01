"""Runs trainings of megamtp.pretrain, several at a time if there are several GPUs, and reads their losses.

Tests: tests/unit/tools/benchmarks/test_learning.py.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from benchmarks.processes import call
from megamtp.config import RESOLVED, differences, read_config
from megamtp.errors import InputError
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import records_until

LOG = "log.txt"
DIVERGED = "non-finite steps in a row"  # megamtp.pretrain's error contains it (megamtp/training/loop.py)
LARGEST_STEP = 2**63 - 1


@dataclass(frozen=True)
class TrainingLosses:
    """The losses of one training, in nats per token.

    Attributes:
        training: [steps, heads].
        validations: [heads] by step.
        diverged: the training ended because a loss or a gradient was not finite.
    """

    training: np.ndarray
    validations: dict[int, np.ndarray]
    diverged: bool = False

    def curve(self, steps_a_point: int) -> np.ndarray:
        """Returns means over steps_a_point steps, [points, heads]."""
        points = len(self.training) // steps_a_point
        return self.training[: points * steps_a_point].reshape(points, steps_a_point, self.training.shape[1]).mean(1)


@dataclass(frozen=True)
class TrainingRun:
    """A training in a run directory.

    Attributes:
        settings: returns the arguments of megamtp.pretrain without run.directory.
        first_arguments: further arguments of `module`, before those of megamtp.pretrain.
        last_step: the run is finished after its first evaluation at this step or later.
        may_diverge: whether it is a finished run, too, if it has ended because a loss or a gradient was not finite. Its
            output goes to a log, which says so.
    """

    directory: Path
    settings: Callable[[], list[str]]
    last_step: int
    module: str = "megamtp.pretrain"
    first_arguments: tuple[str, ...] = ()
    may_diverge: bool = False

    @property
    def log(self) -> Path:
        return self.directory / LOG

    @property
    def diverged(self) -> bool:
        return self.may_diverge and self.log.exists() and DIVERGED in self.log.read_text(errors="replace")

    @property
    def finished(self) -> bool:
        return self.diverged or any(
            record["kind"] == "validation" and record["step"] >= self.last_step for record in self._records()
        )

    def _settings(self) -> list[str]:
        return [*self.settings(), f"run.directory={self.directory}"]

    def check(self) -> None:
        """Raises InputError if the settings are invalid, or if the folder has a run with other settings."""
        config, resolved = read_config(self._settings()), self.directory / RESOLVED
        if resolved.exists() and (changes := differences(read_config([str(resolved)]), config)):
            raise InputError(
                f"{self.directory} has a training with other settings ({'; '.join(changes)}); expected the same: "
                "choose another folder with --runs"
            )

    def train(self, has_log: bool, environment: dict[str, str] | None = None) -> None:
        """Trains to the last step; resumes an interrupted run. Raises InputError."""
        arguments = [*self.first_arguments, *self._settings()]
        log = self.log if has_log or self.may_diverge else None
        try:
            call(self.module, *arguments, log=log, environment=environment)
        except InputError:
            if not self.diverged:
                raise

    def read(self) -> TrainingLosses:
        """Returns the losses of a finished run. Raises InputError if the run did not reach its last step."""
        records = self._records()
        training = [record["losses"] for record in records if record["kind"] == "train"]
        validations = {
            record["step"]: np.array(record["losses"], float) for record in records if record["kind"] == "validation"
        }
        complete = len(training) >= self.last_step and max(validations, default=0) >= self.last_step
        if not training or not (complete or self.diverged):
            raise InputError(
                f"{self.directory / METRICS} has {len(training)} training steps; expected {self.last_step}, and a "
                "validation after the last: run the benchmark again, which resumes the training"
            )
        return TrainingLosses(np.array(training, float), validations, self.diverged)

    def _records(self) -> list[dict]:
        return [json.loads(line) for line in records_until(self.directory / METRICS, LARGEST_STEP)]


def train_all(runs: list[TrainingRun], jobs: int) -> None:
    """Trains the runs that are not finished, `jobs` at a time, each on one of the visible GPUs.

    If several train at a time, their output goes to logs. After an error no further training starts. Raises InputError.
    """
    pending = [run for run in runs if not run.finished]
    if jobs == 1:
        for run in pending:
            run.train(has_log=False)
        return
    environments: SimpleQueue[dict[str, str]] = SimpleQueue()
    for environment in _environments(jobs):
        environments.put(environment)

    def train(run: TrainingRun) -> None:
        environment = environments.get()
        try:
            run.train(has_log=True, environment=environment)
        finally:
            environments.put(environment)

    with ThreadPoolExecutor(jobs) as executor:
        futures = [executor.submit(train, run) for run in pending]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        executor.shutdown(wait=False, cancel_futures=True)
    for future in finished:
        future.result()


def _environments(jobs: int) -> list[dict[str, str]]:
    """Returns the variables of each job, which choose a GPU in turn. They are empty without a GPU."""
    count = torch.cuda.device_count()
    if not count:
        return [{}] * jobs
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    return [{"CUDA_VISIBLE_DEVICES": visible[index % count]} for index in range(jobs)]

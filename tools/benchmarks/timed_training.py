"""Runs megamtp.pretrain and records when each step's forward and backward passes and its optimizer end.

    python -m benchmarks.timed_training TIMES.jsonl configs/1.3b_n4.yaml train.steps=20 ...

Rank 0 appends a JSON object per step: "passes", seconds from the start of train_batch to the end of the last backward
pass, and "optimizer", seconds of DeepSpeed's optimizer step with its clipping and its reductions.

Tests: tests/unit/tools/benchmarks/test_train_step.py.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

# First: see megamtp/pretrain.py.
from megamtp import pretrain

# isort: split
import torch

from megamtp.engines.hosted import HostedEngine

FIRST_ARGUMENT = 1  # of sys.argv, behind the module


class Clock:
    """Points in time: of the GPU's work so far, or of the CPU without a GPU."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        self._seconds = time.perf_counter()
        if self._event:
            self._event.record()

    def seconds_until(self, later: "Clock") -> float:
        """Returns the seconds between two points in time. Waits for the GPU."""
        if self._event is None or later._event is None:
            return later._seconds - self._seconds
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1e3


@contextmanager
def recording(path: Path) -> Iterator[None]:
    """Within the block, engines append the times of each step to the file, on rank 0."""
    attach_model = HostedEngine.attach_model

    def attach_and_time(engine: Any, model: Any) -> None:
        attach_model(engine, model)
        train_batch, take_model_step = engine.train_batch, engine.deepspeed_engine._take_model_step
        points: list[Clock] = []

        def timed_step(*arguments: Any, **options: Any) -> None:
            points.append(Clock())
            take_model_step(*arguments, **options)
            points.append(Clock())

        def timed_batch(*arguments: Any) -> Any:
            points[:] = [Clock()]
            result = train_batch(*arguments)
            start, end_of_passes, end = points
            seconds = {"passes": start.seconds_until(end_of_passes), "optimizer": end_of_passes.seconds_until(end)}
            if engine.rank == 0:
                with path.open("a") as stream:
                    stream.write(json.dumps(seconds) + "\n")
            return result

        engine.deepspeed_engine._take_model_step, engine.train_batch = timed_step, timed_batch

    with patch.object(HostedEngine, "attach_model", attach_and_time):
        yield


if __name__ == "__main__":
    times = Path(sys.argv.pop(FIRST_ARGUMENT))
    with recording(times):
        pretrain.entry()

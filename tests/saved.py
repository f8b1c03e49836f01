"""Saves checkpoints of engines under test, as training does, and loads their weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megamtp.checkpoint import formats
from megamtp.checkpoint.tensors import read_tensor
from megamtp.config import Config, ModelConfig
from megamtp.engines.base import Engine
from megamtp.training.saving import Saver


class NoMetrics:
    """A replacement of Metrics that reports nothing."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def report_checkpoint(self, *arguments: object) -> None:
        pass


def save(config: Config, engine: Engine, step: int) -> None:
    """Saves a checkpoint of the engine in config.run.directory. Collective: all ranks must call it."""
    saver = Saver(config, engine, NoMetrics())
    saver.begin(step, {})
    saver.finish()


def load_weights(checkpoint: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Returns the model of a checkpoint and its fp32 weights, by MTPModel's parameter names."""
    contents = formats.read(checkpoint)
    return contents.model, {name: read_tensor(contents.weights, name) for name in contents.weights.shapes}

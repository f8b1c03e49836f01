"""Checkpoints of engines under test, written as training writes them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megamtp.checkpoint import formats
from megamtp.checkpoint.tensors import whole
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
    """Publishes a checkpoint of the engine's state in config.run.directory. Collective."""
    saver = Saver(config, engine, NoMetrics())
    saver.begin(step, {})
    saver.finish()


def load_weights(checkpoint: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A checkpoint's model and its fp32 weights by MTPModel's parameter names."""
    contents = formats.read(checkpoint)
    return contents.model, {name: whole(contents.weights, name) for name in contents.weights.shapes}

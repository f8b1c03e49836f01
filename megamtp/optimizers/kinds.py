"""The kinds of optimizers by name."""

from collections.abc import Mapping

from megamtp.config import OptimizerConfig
from megamtp.extensions import find_kind
from megamtp.optimizers.adamw import AdamW
from megamtp.optimizers.base import OptimizerKind

OPTIMIZERS: Mapping[str, type[OptimizerKind]] = {"adamw": AdamW}


def optimizer_kind(settings: OptimizerConfig) -> type[OptimizerKind]:
    """The class of `optimizer.kind`. Raises InputError: that name is not known."""
    return find_kind(settings.kind, OPTIMIZERS, OptimizerKind, "optimizer.kind")

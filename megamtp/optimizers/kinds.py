"""The optimizer kinds that `optimizer.kind` names."""

from collections.abc import Mapping

from megamtp.config import OptimizerConfig
from megamtp.extensions import find_kind
from megamtp.optimizers.adamw import AdamW
from megamtp.optimizers.base import OptimizerKind

OPTIMIZERS: Mapping[str, type[OptimizerKind]] = {"adamw": AdamW}


def optimizer_kind(settings: OptimizerConfig) -> type[OptimizerKind]:
    """Returns the class that `optimizer.kind` names.

    Raises:
        InputError: see find_kind.
    """
    return find_kind(settings.kind, OPTIMIZERS, OptimizerKind, "optimizer.kind")

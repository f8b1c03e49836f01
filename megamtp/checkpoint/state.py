"""What a run's checkpoint holds beside tensors: the optimizer's kind and counts, DeepSpeed's counters, the position
in the data.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamtp.errors import CheckpointError

COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of DeepSpeed's engine


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps.

    Attributes:
        kind: optimizer.kind of the configuration.
        tensors: names of its tensors; every parameter has one of each, fp32 and of the parameter's shape.
        steps: taken, without skipped ones: of each parameter group, or one number for all of them.
    """

    kind: str
    tensors: tuple[str, ...]
    steps: tuple[int, ...]

    def steps_of(self, group: int) -> int:
        """Raises IndexError: there are fewer groups."""
        return self.steps[group] if len(self.steps) > 1 else self.steps[0]


@dataclass(frozen=True)
class RunState:
    """The same on all ranks.

    Attributes:
        counters: DeepSpeed's, by their names in COUNTERS.
        loss_scale: of the loss scaler under fp16; None without one.
        data: DataPosition.to_json of data/position.py; None if it is not known.
    """

    optimizer: OptimizerState
    counters: dict[str, int]
    loss_scale: dict[str, Any] | None = None
    data: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)


def read_state(saved: Mapping[str, Any], where: Path) -> RunState:
    """What `RunState.to_json` returned, read from the file or folder `where`.

    Raises:
        CheckpointError: it lacks a field, or has one of another type.
    """
    try:
        optimizer = saved["optimizer"] if "optimizer" in saved else _adamw(saved["adam_steps"])
        state = OptimizerState(
            str(optimizer["kind"]), tuple(map(str, optimizer["tensors"])), tuple(map(int, optimizer["steps"]))
        )
        counters = {name: int(saved["counters"][name]) for name in COUNTERS}
        return RunState(state, counters, saved["loss_scale"], saved.get("data"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: the state of the run cannot be read ({error!r}); use another checkpoint"
        ) from None


def _adamw(steps: int) -> dict[str, Any]:
    """Of checkpoints of megamtp 0.1, which knew one optimizer and one count."""
    return {"kind": "adamw", "tensors": ("exp_avg", "exp_avg_sq"), "steps": (steps,)}

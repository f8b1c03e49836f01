"""The state of a run besides tensors: optimizer kind and steps, DeepSpeed's counters, and the position in the data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamtp.errors import CheckpointError

COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # attributes of DeepSpeed's engine


@dataclass(frozen=True)
class OptimizerState:
    """A description of an optimizer's state.

    Attributes:
        kind: optimizer.kind of the configuration.
        tensors: the names of the state tensors of each parameter. They are fp32 and have the parameter's shape.
        steps: steps taken, without skipped steps: one number for each parameter group, or one number for all groups.
    """

    kind: str
    tensors: tuple[str, ...]
    steps: tuple[int, ...]

    def steps_of(self, group: int) -> int:
        """Returns the steps of a parameter group. Raises IndexError if there are fewer groups."""
        return self.steps[group] if len(self.steps) > 1 else self.steps[0]


@dataclass(frozen=True)
class RunState:
    """The part of a run's state that is the same on all ranks.

    Attributes:
        counters: DeepSpeed's counters, with the names in COUNTERS.
        loss_scale: the state of the fp16 loss scaler; None in other precisions.
        data: the position in the data, see DataPosition.to_json; None if it is not known.
    """

    optimizer: OptimizerState
    counters: dict[str, int]
    loss_scale: dict[str, Any] | None = None
    data: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the state as JSON data, which `read_state` reads."""
        return dataclasses.asdict(self)


def read_state(saved: Mapping[str, Any], where: Path) -> RunState:
    """Returns the state of which `RunState.to_json` returned `saved`.

    Args:
        where: the file or folder that `saved` comes from, for the error message.

    Raises:
        CheckpointError: a field is missing or of another type.
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
    """Returns the optimizer of checkpoints of megamtp 0.1, which had only AdamW and one step count."""
    return {"kind": "adamw", "tensors": ("exp_avg", "exp_avg_sq"), "steps": (steps,)}

"""What the training loop asks of an engine, and the normalisation of the loss that all engines share."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.checkpoint.state import RunState
from megamtp.config import TrainConfig
from megamtp.data.loader import Batch
from megamtp.targets import IGNORED

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by train.precision


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as this rank saw it.

    Attributes:
        nll_sums: [n] on the device: each head's negative log-likelihood summed over this rank's valid targets; 0 where
            another rank computes that head.
        gradient_norm: norm of the whole gradient before clipping; not finite in a skipped step.
        skipped: the gradient was not finite, and DeepSpeed has left the weights as they were.
    """

    nll_sums: Tensor
    gradient_norm: float
    skipped: bool


@dataclass(frozen=True)
class EngineState:
    """What must be saved to go on as if nothing had happened.

    Attributes:
        tensors: this rank's slices of weights and optimizer tensors by slice_key (checkpoint/shards.py), and its random
            states; in place.
        shapes: of the whole parameters that they are slices of, by name.
        run: the rest, the same on all ranks, for the manifest.
    """

    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    run: RunState


class Engine(Protocol):
    """A model, its optimizer and its ranks. Every method but `state` is collective: all ranks call it, in the same
    order.

    Ranks of the same data_parallel_rank (of data_parallel_size) read the same micro-batches: the stages of one
    pipeline.
    """

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    device: torch.device

    def train_batch(self, micro_batches: list[Batch], target_counts: list[int], lr: float) -> StepResult:
        """One optimizer step over this rank's micro-batches (all ranks have equally many).

        Args:
            target_counts: each head's number of valid targets in the whole step, over all ranks: see count_targets.
        """

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """[n + n] on the device: each head's summed negative log-likelihood, then its number of valid targets, of this
        rank.

        Both are 0 where another rank computes that head.
        """

    def state(self) -> EngineState:
        """This rank's part of weights, optimizer and random states, in place: copy it before the next step. Not
        collective.
        """

    def load(self, checkpoint: Path) -> None:
        """Restores `state` from a checkpoint of any engine at any world size, bit for bit. (Random states only of the
        same engine at the same world size; others start anew.) Collective.

        Raises:
            CheckpointError: files are damaged, or of another model.
        """


def compiles_layers(train: TrainConfig, device: torch.device) -> bool:
    """Whether layers run through torch.compile."""
    return device.type == "cuda" if train.compile is None else train.compile


def on_device(micro_batches: Iterable[Batch], device: torch.device) -> list[Batch]:
    """All before the first pass: to copy them later would each time wait for what the device is doing."""
    return [batch.to(device) for batch in micro_batches]


def count_targets(
    micro_batches: list[Batch], can_be_ignored: bool, data_parallel_size: int, device: torch.device
) -> list[int]:
    """Each head's number of valid targets in a step, over all ranks and micro-batches (N_i).

    Collective (one all-reduce of n integers), except when no target can be ignored: then it is a constant.
    """
    if not can_be_ignored:
        positions = sum(batch.targets[0].numel() for batch in micro_batches) * data_parallel_size
        return [positions] * len(micro_batches[0].targets)
    counts = torch.stack([(batch.targets != IGNORED).sum(dim=(1, 2)) for batch in micro_batches]).sum(dim=0).to(device)
    dist.all_reduce(counts)
    readers = dist.get_world_size() // data_parallel_size  # of every micro-batch
    return [count // readers for count in counts.tolist()]


def loss_scales(weights: list[float], target_counts: list[int], averaged_ranks: int, accumulation: int) -> list[float]:
    """The factor of each head's summed cross-entropy: weight_i * D * A / N_i, and 0 where a head has no target.

    D and A undo the averages over ranks and micro-batches that the engine takes, so that what remains is the mean over
    all valid targets of the step, however they are spread. D is 1 where gradients are summed over the ranks.
    """
    return [
        weight * averaged_ranks * accumulation / count if count else 0.0
        for weight, count in zip(weights, target_counts, strict=True)
    ]

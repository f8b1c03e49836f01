"""The interface between the training loop and an engine, and the loss normalisation that all engines share."""

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
from megamtp.model.layers import LayerOptions
from megamtp.targets import IGNORED

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by train.dtype


@dataclass(frozen=True)
class StepResult:
    """The results of one optimizer step on this rank.

    Attributes:
        nll_sums: [n] on the device: each head's negative log-likelihood, summed over this rank's valid targets. It
            is 0 for a head that another rank computes.
        gradient_norm: norm of the whole gradient over all ranks, before clipping. Not finite if the step was skipped.
        skipped: whether DeepSpeed left the weights unchanged because the gradient was not finite.
    """

    nll_sums: Tensor
    gradient_norm: float
    skipped: bool


@dataclass(frozen=True)
class EngineState:
    """The state that a checkpoint needs so that a resumed run equals an uninterrupted one.

    Attributes:
        tensors: this rank's slices of weights and optimizer tensors by slice_key (checkpoint/shards.py), and its random
            number states. The tensors are not copies: the next step changes them.
        shapes: shapes of the full parameters, by name.
        run: the remaining state for the manifest, the same on all ranks.
    """

    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    run: RunState


class Engine(Protocol):
    """A model and its optimizer on all ranks. All methods except `state` are collective: every rank must call them.

    data_parallel_rank is below data_parallel_size. Ranks that share it are the stages of one pipeline: they read the
    same micro-batches.
    """

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    device: torch.device

    def train_batch(self, micro_batches: list[Batch], target_counts: list[int], lr: float) -> StepResult:
        """Runs one optimizer step over this rank's micro-batches. All ranks have the same number of them.

        Args:
            target_counts: each head's number of valid targets in the whole step, over all ranks; see count_targets.
            lr: the learning rate of this step.
        """

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """Returns [n + n] on the device: this rank's negative log-likelihood summed per head, then its target counts.

        The target counts are numbers of valid targets. For a head that another rank computes, the sum and the count
        are 0.
        """

    def state(self) -> EngineState:
        """Returns this rank's weights, optimizer state and random number states. Not collective.

        The tensors are not copies: the next step changes them.
        """

    def load(self, checkpoint: Path) -> None:
        """Restores `state` from a checkpoint of any engine at any world size, bit for bit.

        Random number states are restored only from the same engine.kind at the same world size; otherwise they get new
        seeds.

        Raises:
            CheckpointError: a file is damaged, or the checkpoint belongs to another model.
        """


def layer_options(train: TrainConfig, device: torch.device) -> LayerOptions:
    """Returns how layers run. By default they run through torch.compile on a GPU."""
    compiled = device.type == "cuda" if train.compile is None else train.compile
    return LayerOptions(train.activation_checkpointing, compiled, train.precision == "fp8", train.cuda_graphs)


def move_to_device(micro_batches: Iterable[Batch], device: torch.device) -> list[Batch]:
    """Copies all micro-batches up front: a later copy would wait for queued GPU work."""
    return [batch.to(device) for batch in micro_batches]


def count_targets(
    micro_batches: list[Batch], can_be_ignored: bool, data_parallel_size: int, device: torch.device
) -> list[int]:
    """Returns each head's number of valid targets in a step, over all ranks and micro-batches.

    Collective (one all-reduce of n integers) if targets can be ignored; otherwise the numbers are known.
    """
    if not can_be_ignored:
        positions = sum(batch.targets[0].numel() for batch in micro_batches) * data_parallel_size
        return [positions] * len(micro_batches[0].targets)
    counts = torch.stack([(batch.targets != IGNORED).sum(dim=(1, 2)) for batch in micro_batches]).sum(dim=0).to(device)
    dist.all_reduce(counts)
    ranks_per_micro_batch = dist.get_world_size() // data_parallel_size
    return [count // ranks_per_micro_batch for count in counts.tolist()]


def loss_scales(
    weights: list[float], target_counts: list[int], num_averaged_ranks: int, num_micro_batches: int
) -> list[float]:
    """Returns the factor of each head's summed cross-entropy; 0 for a head without targets.

    For head i it is weights[i] * num_averaged_ranks * num_micro_batches / target_counts[i]. DeepSpeed averages
    gradients over ranks and micro-batches. The factor undoes these averages, so the loss of a step is the mean over all
    its valid targets, no matter how they are distributed.

    Args:
        num_averaged_ranks: number of ranks that gradients are averaged over; 1 if gradients are summed over the ranks.
    """
    return [
        weight * num_averaged_ranks * num_micro_batches / count if count else 0.0
        for weight, count in zip(weights, target_counts, strict=True)
    ]

"""One pipeline stage: its part of the model, and what it does with each micro-batch.

Tests: tests/distributed/test_pipeline.py, tests/distributed/test_spread_pipeline.py.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, cast

import torch
from torch import Tensor

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import DTYPES, compiles_layers
from megamtp.engines.initial_weights import initial_weights
from megamtp.model.part import Extent, ModelPart
from megamtp.planning.partition import Partition, Stage
from megamtp.planning.spread import SpreadPartition


class RowsOfWeight(Protocol):
    """A parameter that is some rows of a whole one: `first_element` is their first in it."""

    whole_shape: tuple[int, ...]
    first_element: int


class StagePart(ModelPart):
    """A stage's part of the model on one device, with its initial weights.

    Between stages travels z alone. The losses stay where they are computed, and every stage reads its own batches.

    Attributes:
        own: this stage of the partition.
        nll_sums: [n], see StepResult; since `begin`.
    """

    def __init__(self, config: Config, own: Stage, device: torch.device, first_row: int = 0):
        train = config.train
        with torch.device("meta"):
            super().__init__(
                config.model,
                _extent(config, own, first_row),
                config.head_loss,
                recompute_trunk=train.activation_checkpointing,
                compile_layers=compiles_layers(train, device),
            )
        self.run_config, self.own, self.device = config, own, device
        self.to(DTYPES[train.precision]).to_empty(device=device)
        if own.contents.spread and self.extent.rows:  # checkpoints hold tensors in slices
            weight = cast(RowsOfWeight, self.unembedding_weight)
            weight.whole_shape = config.model.vocab_size, config.model.dim
            weight.first_element = first_row * config.model.dim
        self.initialise()

    @property
    def copied_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that every stage with heads has a copy of."""
        if self.unembedding is None or not self.own.heads:
            return []
        return (
            [self.unembedding.get_parameter("norm")]
            if self.own.contents.spread
            else list(self.unembedding.parameters())
        )

    def begin(self, batches: Iterable[Batch], loss_scales: list[float]) -> None:
        """Before a step or an evaluation: its micro-batches, on the device, and the factor of each head's loss."""
        self.batches, self.loss_scales = iter(batches), loss_scales
        self.nll_sums = torch.zeros(self.config.num_future_tokens, dtype=torch.float64, device=self.device)

    def forward(self, x: Tensor) -> Tensor:
        """One micro-batch, in the order of `begin`.

        Args:
            x: token ids [B, T] in the first stage, else what the stage before returned.

        Returns:
            What the trunk has made of it so far, [B, T, D]; z from its end on; in the last stage the loss of its heads.
        """
        batch = next(self.batches)
        document_mask = self.document_mask(batch.documents)
        x = self.run_trunk(x, document_mask)
        if not self.own.heads:
            return x
        x, nll_sums = self.losses(x, batch.targets, self.loss_scales, document_mask)
        self.nll_sums[self.own.heads.start : self.own.heads.stop] += nll_sums
        return x

    def run_layers(self, x: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """One micro-batch, of which other stages make the losses: (the trunk's output here, the heads' normed: [B,
        T, D] each).
        """
        document_mask = self.document_mask(batch.documents)
        x = self.run_trunk(x, document_mask)
        return x, self.normed_heads(x, document_mask)

    @torch.no_grad()
    def initialise(self) -> None:
        """Gives every parameter its initial value."""
        initial = initial_weights(self.run_config)
        for name, parameter in self.named_parameters():
            parameter.copy_(self._own_part(name, parameter, initial))

    def _own_part(self, name: str, parameter: Tensor, initial: Callable[[str, tuple[int, ...]], Tensor]) -> Tensor:
        if name != "unembedding.weight":
            return initial(name, tuple(parameter.shape))
        rows = self.extent.rows
        return initial(name, (self.config.vocab_size, self.config.dim))[rows.start : rows.stop]


def stage_part(config: Config, cut: Partition | SpreadPartition, index: int, device: torch.device) -> StagePart:
    """The part of stage `index` of a cut."""
    first_row = sum(stage.contents.rows for stage in cut.stages[:index] if stage.contents.spread)
    return StagePart(config, cut.stages[index], device, first_row)


def _extent(config: Config, own: Stage, first_row: int) -> Extent:
    num_trunk_layers = config.model.num_trunk_layers
    trunk = range(min(own.first, num_trunk_layers), min(own.end, num_trunk_layers))
    return Extent(trunk, own.heads, range(first_row, first_row + own.contents.rows))

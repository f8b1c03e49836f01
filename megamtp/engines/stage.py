"""One pipeline stage: its part of the model, and its forward pass of each micro-batch.

Tests: tests/distributed/test_pipeline.py, tests/distributed/test_spread_pipeline.py.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, cast

import torch
from torch import Tensor

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import DTYPES, layer_options
from megamtp.engines.initial_weights import initial_weights
from megamtp.model.extent import Extent
from megamtp.model.part import ModelPart
from megamtp.planning.partition import Partition, Stage
from megamtp.planning.spread import SpreadPartition


class RowSlice(Protocol):
    """A parameter that holds some rows of a full parameter.

    Attributes:
        full_shape: shape of the full parameter.
        first_element: index of the slice's first element in the full parameter, flattened.
    """

    full_shape: tuple[int, ...]
    first_element: int


class StagePart(ModelPart):
    """A stage's part of the model on one device, with its initial weights.

    Stages send only activations and their gradients to each other. Losses stay on the stage that computes them, and
    every stage reads the micro-batches itself.

    Attributes:
        stage: the stage of the partition.
        nll_sums: [n], see StepResult; accumulated since `begin`.
    """

    def __init__(self, config: Config, stage: Stage, device: torch.device, first_row: int = 0):
        train = config.train
        with torch.device("meta"):
            super().__init__(
                config.model,
                _extent(config, stage, first_row),
                config.resolved_head_loss,
                options=layer_options(train, device),
            )
        self.run_config, self.stage, self.device = config, stage, device
        self.to(DTYPES[train.dtype]).to_empty(device=device)
        if stage.contents.spread and self.extent.rows:  # checkpoints store the slice as part of the full tensor
            for name, parameter in self.named_parameters():
                if _has_rows(name):
                    row_slice = cast(RowSlice, parameter)
                    row_slice.full_shape = config.model.vocab_size, config.model.dim
                    row_slice.first_element = first_row * config.model.dim
        self.initialise()

    @property
    def copied_unembedding(self) -> list[torch.nn.Parameter]:
        """The parameters of a shared unembedding that every stage with heads holds a copy of."""
        if self.unembedding is None or not self.stage.heads:
            return []
        return (
            [self.unembedding.get_parameter("norm")]
            if self.stage.contents.spread
            else list(self.unembedding.parameters())
        )

    @property
    def copied_embedding(self) -> list[torch.nn.Parameter]:
        """The embedding, of which the first stage and every stage with a head that reads tokens hold a copy."""
        return [] if self.embedding is None else list(self.embedding.parameters())

    def begin(self, micro_batches: Iterable[Batch], loss_scales: list[float]) -> None:
        """Begins a step or an evaluation.

        Args:
            micro_batches: the micro-batches of the step or evaluation, on the device.
            loss_scales: one factor per head; see MTPModel.forward.
        """
        self.batches, self.loss_scales = iter(micro_batches), loss_scales
        self.nll_sums = torch.zeros(self.config.num_future_tokens, dtype=torch.float64, device=self.device)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the next of the micro-batches that were passed to `begin`.

        Args:
            x: token ids [B, T] on the first stage, else the previous stage's output.

        Returns:
            On the last stage the heads' loss; on other stages with heads the state for the next head; else the trunk's
            hidden states. All but the loss are [B, T, D].
        """
        batch = next(self.batches)
        document_mask = self.document_mask(batch.documents)
        x_BTD, embedded = self._embed(x, batch)
        state_BTD = self.run_trunk(x_BTD, document_mask)
        if not self.stage.heads:
            return state_BTD
        loss_or_state, nll_sums = self.run_heads(state_BTD, batch.targets, self.loss_scales, document_mask, embedded)
        self.nll_sums[self.stage.heads.start : self.stage.heads.stop] += nll_sums
        return loss_or_state

    def run_layers(self, x: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Runs trunk layers and heads without losses, for a pipeline with spread losses.

        Args:
            x: see `forward`.

        Returns:
            (the output for the next stage [B, T, D], the normed output [B, T, D] of each head).
        """
        document_mask = self.document_mask(batch.documents)
        x_BTD, embedded = self._embed(x, batch)
        return self.run_heads_without_losses(self.run_trunk(x_BTD, document_mask), document_mask, embedded)

    def _embed(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Returns (the input of the trunk layers, the embeddings that heads read)."""
        if self.embedding is None:
            return x, None
        own_BTD, embedded = self.embed(batch.inputs, batch.following)
        return own_BTD if self.stage.contents.has_embedding else x, embedded

    @torch.no_grad()
    def initialise(self) -> None:
        """Sets every parameter to its initial value."""
        initial = initial_weights(self.run_config)
        for name, parameter in self.named_parameters():
            parameter.copy_(self._initial_slice(name, parameter, initial))

    def _initial_slice(self, name: str, parameter: Tensor, initial: Callable[[str, tuple[int, ...]], Tensor]) -> Tensor:
        if not _has_rows(name):
            return initial(name, tuple(parameter.shape))
        rows = self.extent.rows
        return initial(name, (self.config.vocab_size, self.config.dim))[rows.start : rows.stop]


def stage_part(config: Config, partition: Partition | SpreadPartition, index: int, device: torch.device) -> StagePart:
    """Builds the part of stage `index` of a partition."""
    first_row = sum(stage.contents.rows for stage in partition.stages[:index] if stage.contents.spread)
    return StagePart(config, partition.stages[index], device, first_row)


def _extent(config: Config, stage: Stage, first_row: int) -> Extent:
    num_trunk_layers = config.model.num_trunk_layers
    trunk = range(min(stage.first, num_trunk_layers), min(stage.end, num_trunk_layers))
    rows = range(first_row, first_row + stage.contents.rows)
    return Extent(trunk, stage.heads, rows, stage.contents.spread)


def _has_rows(name: str) -> bool:
    """Returns whether a parameter is the projection of an unembedding, of which a stage may hold some rows only."""
    return name.startswith(("unembedding.", "unembeddings.")) and name.endswith(".weight")

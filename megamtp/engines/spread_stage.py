"""A stage whose share of the losses is some rows of the unembedding, for all heads, wherever these are."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megamtp.config import ModelConfig
from megamtp.data.loader import Batch
from megamtp.engines.stage import PipelineStage
from megamtp.model.layers import rms_norm


class SlicedUnembedding(nn.Module):
    """Rows of the unembedding (weight: None if there are none), and in a stage with heads the final norm (else None)."""

    def __init__(self, model: ModelConfig, rows: int, has_heads: bool):
        super().__init__()
        self.norm = nn.Parameter(torch.empty(model.dim)) if has_heads else None
        self.weight = nn.Parameter(torch.empty(rows, model.dim)) if rows else None
        self.eps = model.norm_eps

    def normed(self, hidden_BTD: Tensor) -> Tensor:
        return rms_norm(hidden_BTD, self.norm, self.eps)


class SpreadStage(PipelineStage):
    """Its parameters are named as in MTPModel; `unembedding.weight` are the rows from `first_row` on.

    DeepSpeed does not call it: engines/spread_passes.py does.
    """

    @property
    def first_row(self) -> int:
        return sum(stage.contents.rows for stage in self.cut.stages if stage.first < self.own.first)

    @property
    def copied_parameters(self) -> list[nn.Parameter]:
        return [self.unembedding.norm] if self.heads else []

    def run_layers(self, x: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """One micro-batch: (what the trunk has made of it so far, what this stage's heads make of z, normed: [B, T, D] each)."""
        separation = self._separation(batch)
        x = self._run_trunk(x, separation)
        return x, [self.unembedding.normed(head(x, separation)) for head in self.heads.values()]

    def _build(self) -> None:
        super()._build()
        if self.unembedding.weight is not None:  # for checkpoints, which hold tensors in slices
            self.unembedding.weight.whole_shape = self.config.model.vocab_size, self.config.model.dim
            self.unembedding.weight.first_element = self.first_row * self.config.model.dim

    def _make_unembedding(self) -> SlicedUnembedding:
        return SlicedUnembedding(self.config.model, self.own.contents.rows, bool(self.heads))

    def _own_part(self, name: str, initial: Callable[[str, tuple[int, ...]], Tensor]) -> Tensor:
        if name != "unembedding.weight":
            return super()._own_part(name, initial)
        model = self.config.model
        return initial(name, (model.vocab_size, model.dim))[self.first_row :][: self.own.contents.rows]

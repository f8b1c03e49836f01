"""The final norm and the projection to the vocabulary: one for all heads, or one for each (model.unembedding)."""

from typing import Any

import torch
from torch import Tensor, nn

from megamtp.config import ModelConfig
from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.model.layers import rms_norm


class Unembedding(nn.Module):
    """The final norm and the projection to the vocabulary.

    One module holds both parameters directly, so that ZeRO-3 gathers them together, once.

    Args:
        rows: number of rows of the projection in this part of the model; 0 if it has only the norm.
        has_norm: whether this part has the norm; every part with a head that uses this unembedding does.
    """

    def __init__(self, model: ModelConfig, rows: int, has_norm: bool = True):
        super().__init__()
        self.norm = nn.Parameter(torch.empty(model.dim)) if has_norm else None
        self.weight = nn.Parameter(torch.empty(rows, model.dim)) if rows else None
        self.eps = model.norm_eps

    def normed(self, hidden_BTD: Tensor) -> Tensor:
        """Returns the hidden state after the final norm."""
        norm = self.norm
        assert norm is not None
        return rms_norm(hidden_BTD, norm, self.eps)

    def forward(
        self, hidden_BTD: Tensor, targets_BT: Tensor | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Returns the logits [B, T, V] without targets, else (loss, summed negative log-likelihood, normed hidden).

        The module computes the loss itself, because ZeRO-3 gathers the weight only while `forward` runs.

        Args:
            options: passed to linear_cross_entropy.
        """
        normed_BTD, weight = self.normed(hidden_BTD), self.weight
        assert weight is not None
        if targets_BT is None:
            return normed_BTD @ weight.T
        loss, nll_sum = linear_cross_entropy(normed_BTD.flatten(0, -2), weight, targets_BT.flatten(), **options)
        return loss, nll_sum, normed_BTD

"""What follows the trunk: n heads, each one transformer layer on the same z, and the unembedding they share.

Head i, counted from 1 as in the paper, predicts the i-th next token; head 1 is the ordinary next-token head. In lists and
tensors head i sits at index i - 1.
"""

import torch
from torch import Tensor, nn

from megamtp.config import ModelConfig
from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.model.layers import rms_norm


class Unembedding(nn.Module):
    """The final norm and the projection to the vocabulary, shared by all heads.

    One module holds both parameters directly, so that a sharded engine fetches them together, once.
    """

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.norm = nn.Parameter(torch.empty(model.dim))
        self.weight = nn.Parameter(torch.empty(model.vocab_size, model.dim))
        self.eps = model.norm_eps

    def forward(self, hidden_BTD: Tensor, targets_BT: Tensor | None = None, **options) -> Tensor | tuple[Tensor, Tensor]:
        """Without targets: logits [B, T, V]. With: (loss, summed negative log-likelihood), see linear_cross_entropy.

        The loss is computed in here, not outside, because a sharded engine has the weight only while this runs.
        """
        normed_BTD = rms_norm(hidden_BTD, self.norm, self.eps)
        if targets_BT is None:
            return normed_BTD @ self.weight.T
        return linear_cross_entropy(normed_BTD.flatten(0, -2), self.weight, targets_BT.flatten(), **options)

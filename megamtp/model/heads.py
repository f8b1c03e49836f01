"""What follows the trunk: n heads, and the unembedding they share.

Head i, counted from 1 as in the paper, predicts the i-th next token; head 1 is the ordinary next-token head. In lists
and tensors head i sits at index i - 1.

A head kind is a subclass of Head. `model.head_kind` names it: `parallel`, or MODULE:CLASS of a module of your own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megamtp.config import ModelConfig
from megamtp.errors import InputError
from megamtp.extensions import find_kind
from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.model.layers import KeyValueCache, LayerCost, Separation, TransformerLayer, rms_norm


class Head(nn.Module):
    """One head: it turns z into the hidden state whose unembedding predicts a token.

    An engine gathers a head's parameters together, before `forward`. They are initialised by their names: see
    initial.py. A subclass is made as `Kind(model, index, compiled)`: a ModelConfig, the head's index from 0, and
    whether to run through torch.compile what can be.
    """

    def forward(self, z_BTD: Tensor, separation: Separation | None = None) -> Tensor:
        """The hidden state [B, T, D], before the final norm.

        Args:
            separation: of the documents that the windows hold, where attention is to stay inside them.
        """
        raise NotImplementedError

    def cost(self, sequence_length: int) -> LayerCost:
        """What one position of a window of `sequence_length` costs in the forward pass."""
        raise NotImplementedError

    def extend(self, z_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        """Decoding: the hidden states of T new positions behind the cached ones, and the longer cache."""
        raise InputError(f"{type(self).__name__} does not decode; expected a head kind with `extend`, such as parallel")


class ParallelHead(TransformerLayer, Head):
    """One transformer layer that reads z. Source: Gloeckle et al. 2024, arXiv:2404.19737, section 2."""

    def __init__(self, model: ModelConfig, index: int, compiled: bool = False):
        TransformerLayer.__init__(self, model, compiled=compiled)


HEAD_KINDS: Mapping[str, type[Head]] = {"parallel": ParallelHead}


def head_class(model: ModelConfig) -> type[Head]:
    """The class of `model.head_kind`. Raises InputError: that name is not known."""
    return find_kind(model.head_kind, HEAD_KINDS, Head, "model.head_kind")


class Unembedding(nn.Module):
    """The final norm and the projection to the vocabulary, shared by all heads.

    One module holds both parameters directly, so that a sharded engine fetches them together, once.

    Args:
        rows: of the projection; a stage of a pipeline whose losses are spread by vocabulary has some of them, or none.
        has_norm: whether hidden states are normed here: wherever there is a head.
    """

    def __init__(self, model: ModelConfig, rows: int, has_norm: bool = True):
        super().__init__()
        self.norm = nn.Parameter(torch.empty(model.dim)) if has_norm else None
        self.weight = nn.Parameter(torch.empty(rows, model.dim)) if rows else None
        self.eps = model.norm_eps

    def normed(self, hidden_BTD: Tensor) -> Tensor:
        """The hidden state after the final norm."""
        norm = self.norm
        assert norm is not None
        return rms_norm(hidden_BTD, norm, self.eps)

    def forward(
        self, hidden_BTD: Tensor, targets_BT: Tensor | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Without targets: logits [B, T, V]. With: (loss, summed negative log-likelihood).

        The loss is computed in here, not outside, because a sharded engine has the weight only while this runs.

        Args:
            options: of linear_cross_entropy.
        """
        normed_BTD, weight = self.normed(hidden_BTD), self.weight
        assert weight is not None
        if targets_BT is None:
            return normed_BTD @ weight.T
        return linear_cross_entropy(normed_BTD.flatten(0, -2), weight, targets_BT.flatten(), **options)

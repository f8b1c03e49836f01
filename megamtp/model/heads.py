"""The modules after the trunk: n heads and the unembedding that they share.

Head i, counted from 1 as in the paper, predicts the i-th next token; head 1 is the next-token head. Its index in lists
and tensors is i - 1.

A head kind is a subclass of Head. `model.head_kind` selects it: `parallel`, or MODULE:CLASS for a class in a module of
your own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megamtp.config import ModelConfig
from megamtp.errors import InputError
from megamtp.extensions import find_kind
from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.model.attention import DocumentMask, KeyValueCache
from megamtp.model.layers import DEFAULT_OPTIONS, LayerCost, LayerOptions, TransformerLayer, rms_norm


class Head(nn.Module):
    """One head: maps z to the hidden state from which the unembedding predicts a token.

    The model constructs a subclass as `Kind(model, index, options)`: the ModelConfig, the head's index from 0, and the
    LayerOptions of the run, which a head of your own may ignore. Initial values follow from the parameters' names: see
    initial.py. ZeRO-3 gathers all parameters of a head before `forward`, except for those that a TransformerLayer uses
    in fp8: see TransformerLayer.quantised.
    """

    def forward(self, z_BTD: Tensor, document_mask: DocumentMask | None = None) -> Tensor:
        """Returns the hidden state [B, T, D] before the final norm.

        Args:
            document_mask: keeps attention inside documents; None: a position attends to all earlier positions.
        """
        raise NotImplementedError

    def cost(self, sequence_length: int) -> LayerCost:
        """Returns the forward cost of one position of a window of `sequence_length`."""
        raise NotImplementedError

    def extend(self, z_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        """Returns the hidden states of T positions that follow the cached positions, and the extended cache.

        Decoding calls this method.

        Raises:
            InputError: this head kind does not implement decoding.
        """
        raise InputError(
            f"{type(self).__name__} does not decode; expected a head kind with a method `extend`, such as parallel"
        )


class ParallelHead(TransformerLayer, Head):
    """One transformer layer that reads z.

    Source: Gloeckle et al. 2024, arXiv:2404.19737, section 2.
    """

    def __init__(self, model: ModelConfig, index: int, options: LayerOptions = DEFAULT_OPTIONS):
        TransformerLayer.__init__(self, model, options)


HEAD_KINDS: Mapping[str, type[Head]] = {"parallel": ParallelHead}


def head_class(model: ModelConfig) -> type[Head]:
    """Returns the class that `model.head_kind` names.

    Raises:
        InputError: see find_kind.
    """
    return find_kind(model.head_kind, HEAD_KINDS, Head, "model.head_kind")


class Unembedding(nn.Module):
    """The final norm and the projection to the vocabulary, shared by all heads.

    One module holds both parameters directly, so that ZeRO-3 gathers them together, once.

    Args:
        rows: number of rows of the projection in this part of the model; 0 if it has only the norm.
        has_norm: whether this part has the norm; every part with heads does.
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
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the logits [B, T, V] without targets, else (loss, summed negative log-likelihood).

        The module computes the loss itself, because ZeRO-3 gathers the weight only while `forward` runs.

        Args:
            options: passed to linear_cross_entropy.
        """
        normed_BTD, weight = self.normed(hidden_BTD), self.weight
        assert weight is not None
        if targets_BT is None:
            return normed_BTD @ weight.T
        return linear_cross_entropy(normed_BTD.flatten(0, -2), weight, targets_BT.flatten(), **options)

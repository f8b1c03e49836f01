"""START READING HERE: the multi-token prediction model of Gloeckle et al. 2024 (arXiv:2404.19737).

    tokens [B, T] -> embedding -> trunk: L - n layers -> z [B, T, D] -+-> head 1 -> unembedding -> token t + 1
                                                                      +-> head 2 -> unembedding -> token t + 2
                                                                      |   ...
                                                                      +-> head n -> unembedding -> token t + n

Each head is one transformer layer, and all heads read the same z; heads.py has other kinds, some of which read the head
before, or the next tokens. All heads share one unembedding (final norm and projection to the vocabulary), or each has
its own (model.unembedding). With n = 1 this is an ordinary decoder-only model.

MTPModel is a ModelPart that holds the whole model; each pipeline stage is also a ModelPart. MTPModel.forward
returns the training loss. Where to read on:

    part.py         ModelPart: builds the modules, runs the trunk, computes the heads' losses
    layers.py       one transformer layer (attention.py, rotary.py)
    heads.py        the kinds of heads (head.py)
    unembedding.py  the final norm and the projection to the vocabulary
    documents.py    several documents in one window
    initial.py      initial weights
    ../losses/      fused unembedding and cross-entropy; forward and backward of one head after another

Shape suffixes in all files: B batch, T positions of a window, D width, V vocabulary, n heads, H attention heads, K
width of an attention head, N positions of a micro-batch (B T, flattened), C positions of a chunk, S slices of the
vocabulary, R rows of a slice. A file that uses a letter for something else says so after "Shapes:".
The glossary in .github/CONTRIBUTING.md explains the terms.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.model.attention import DocumentMask, KeyValueCache
from megamtp.model.extent import Extent
from megamtp.model.head import Head
from megamtp.model.layers import DEFAULT_OPTIONS, LayerOptions, TransformerLayer
from megamtp.model.part import ModelPart


class MTPModel(ModelPart):
    """The whole model: embedding, trunk, heads and unembedding.

    Args: see ModelPart.
    """

    embedding: nn.Embedding

    def __init__(
        self,
        model: ModelConfig,
        head_loss: HeadLossConfig | None = None,
        schedule: str = "sequential",
        options: LayerOptions = DEFAULT_OPTIONS,
    ):
        super().__init__(model, Extent.whole(model), head_loss, schedule, options)

    def forward(
        self,
        inputs_BT: Tensor,
        targets_nBT: Tensor,
        loss_scales: list[float],
        documents_BT: Tensor | None = None,
        following: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes the training loss of one micro-batch.

        With the "sequential" schedule this call also computes the gradients of the heads' parameters, if gradients are
        enabled; `loss.backward()` then only runs the trunk's backward pass.

        Args:
            inputs_BT: int64 token ids.
            targets_nBT: int64 token ids; [i - 1, b, t] is the i-th token after inputs_BT[b, t], or IGNORED.
            loss_scales: one factor per head: its weight / its number of targets in the global batch. The factor
                multiplies the head's loss, which is summed over targets.
            documents_BT: int64 document numbers, which do not decrease along a row. In trunk and heads, a position
                attends only to earlier positions with the same number. None: to all earlier positions.
            following: int64 [B, n - 1], the tokens after each row of inputs, or IGNORED; needed if heads read tokens.

        Returns:
            (loss, nll_sums [n]): the sum over heads of scale * loss, and each head's negative log-likelihood, summed
            over its targets, without scale and z-loss.
        """
        if self.options.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the graphs may overwrite what the last micro-batch left
        document_mask = self.document_mask(documents_BT)
        x_BTD, embedded = self.embed(inputs_BT, following)
        z_BTD = self.run_trunk(x_BTD, document_mask)
        return self.run_heads(z_BTD, targets_nBT, loss_scales, document_mask, embedded)

    def z(self, inputs_BT: Tensor, document_mask: DocumentMask | None = None) -> Tensor:
        """Returns the trunk's output [B, T, D]."""
        return self.run_trunk(self.embedding(inputs_BT), document_mask)

    def logits(self, inputs_BT: Tensor, following: Tensor | None = None, documents_BT: Tensor | None = None) -> Tensor:
        """Returns the logits of every head [n, B, T, V], for inspection and tests: training never holds them all.

        Args: see `forward`.
        """
        document_mask = self.document_mask(documents_BT)
        x_BTD, embedded = self.embed(inputs_BT, following)
        z_BTD = self.run_trunk(x_BTD, document_mask)
        _, normed = self.run_heads_without_losses(z_BTD, document_mask, embedded)
        return torch.stack([normed_BTD @ self.unembedding_weight(index).T for index, normed_BTD in enumerate(normed)])

    def next_token_logits(
        self, inputs_BT: Tensor, caches: list[KeyValueCache] | None
    ) -> tuple[Tensor, list[KeyValueCache]]:
        """Returns head 1's logits at the last position [B, V], and the extended key/value caches.

        Args:
            inputs_BT: the tokens that follow the cached tokens.
            caches: one per trunk layer, and one for each head that runs, as the previous call returned them; None at
                the start.
        """
        hidden_BTD, order = self.embedding(inputs_BT), self.head_order
        # Heads that run before head 1 belong to it: their outputs are the state that it reads.
        heads = [self.head(index) for index in order[: order.index(0) + 1]]
        layers: list[TransformerLayer | Head] = [*self.trunk, *heads]
        past_caches: Sequence[KeyValueCache | None] = caches or [None] * len(layers)
        extended_caches: list[KeyValueCache] = []
        for layer, past_cache in zip(layers, past_caches, strict=True):
            hidden_BTD, extended_cache = layer.extend(hidden_BTD, past_cache)
            extended_caches.append(extended_cache)
        return self.unembedding_of(0)(hidden_BTD[:, -1]), extended_caches

"""START READING HERE: the multi-token model of Gloeckle et al. 2024 (arXiv:2404.19737).

    tokens [B, T] -> embedding -> trunk of L - n layers -> z [B, T, D] -> head 1 -> unembedding -> next token
                                                             |          -> head 2 -> unembedding -> the token after
                                                             |            ...
                                                             +--------> head n -> unembedding -> n tokens ahead

Each head is one transformer layer on the same z; the unembedding (final norm and projection) is one for all of them.
With n = 1 this is the ordinary decoder-only model. part.py has the modules and how they run; heads.py the kinds of
heads.

Shape suffixes, here and everywhere: B batch, T positions, D width, V vocabulary, N heads (in losses/: rows), H
attention heads, K width of an attention head. The terms are those of the glossary in .github/CONTRIBUTING.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.model.heads import Head, Unembedding
from megamtp.model.layers import KeyValueCache, Separation, TransformerLayer
from megamtp.model.part import Extent, ModelPart


class MTPModel(ModelPart):
    """The whole model: trunk, heads and unembedding. `forward` is the training loss. For the arguments see
    ModelPart.
    """

    embedding: nn.Embedding
    unembedding: Unembedding

    def __init__(
        self,
        model: ModelConfig,
        head_loss: HeadLossConfig | None = None,
        schedule: str = "sequential",
        recompute_trunk: bool = False,
        compile_layers: bool = False,
    ):
        super().__init__(model, Extent.whole(model), head_loss, schedule, recompute_trunk, compile_layers)

    def forward(
        self, inputs_BT: Tensor, targets_NBT: Tensor, loss_scales: list[float], documents_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of one micro-batch.

        Args:
            inputs_BT: int64 token ids.
            targets_NBT: int64; [i - 1, b, t] is the token i positions after inputs[b, t], or IGNORED.
            loss_scales: factor of each head's summed cross-entropy; it holds the head's weight and the global count of
                targets.
            documents_BT: int64, rising in each row; attention, of trunk and heads, stays among positions of equal ones.
                None: it does not stop.

        Returns:
            (loss, nll_sums [n]): the sum over heads of scale * cross-entropy, and each head's bare summed negative
            log-likelihood.
        """
        separation = self.separate(documents_BT)
        return self.losses(self.z(inputs_BT, separation), targets_NBT, loss_scales, separation)

    def z(self, inputs_BT: Tensor, separation: Separation | None = None) -> Tensor:
        """The trunk's output [B, T, D]."""
        return self.run_trunk(inputs_BT, separation)

    def logits(self, inputs_BT: Tensor) -> Tensor:
        """Logits of every head [N, B, T, V]: large; for inspection and tests."""
        z_BTD = self.z(inputs_BT)
        return torch.stack([self.unembedding(head(z_BTD)) for head in self.heads])

    def next_token_logits(
        self, inputs_BT: Tensor, caches: list[KeyValueCache] | None
    ) -> tuple[Tensor, list[KeyValueCache]]:
        """Head 1's logits at the last position [B, V], and the key/value caches of the trunk layers and head 1.

        Args:
            inputs_BT: the tokens not yet in the caches.
            caches: what the previous call returned; None at the start.
        """
        hidden_BTD = self.embedding(inputs_BT)
        layers: list[TransformerLayer | Head] = [*self.trunk, self.heads[0]]
        past: Sequence[KeyValueCache | None] = caches or [None] * len(layers)
        extended: list[KeyValueCache] = []
        for layer, cache in zip(layers, past, strict=True):
            hidden_BTD, longer = layer.extend(hidden_BTD, cache)
            extended.append(longer)
        return self.unembedding(hidden_BTD[:, -1]), extended

"""START READING HERE: the multi-token model of Gloeckle et al. 2024 (arXiv:2404.19737).

    tokens [B, T] -> embedding -> trunk of L - n layers -> z [B, T, D] -> head 1 -> unembedding -> next token
                                                             |          -> head 2 -> unembedding -> the token after
                                                             |            ...
                                                             +--------> head n -> unembedding -> n tokens ahead

Each head is one transformer layer on the same z; the unembedding (final norm and projection) is one for all of them. With n = 1
this is the ordinary decoder-only model.

Shape suffixes, here and everywhere: B batch, T positions, D width, V vocabulary, N heads (in losses/: rows), H attention heads,
K width of an attention head.
"""

import torch
from torch import Tensor, nn

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.losses.float8 import Float8Weight
from megamtp.losses.linear_cross_entropy import SharedGradient
from megamtp.losses.sequential import HeadPhase, SequentialHeadLoss
from megamtp.model.documents import separate
from megamtp.model.heads import Unembedding
from megamtp.model.layers import KeyValueCache, Separation, TransformerLayer


class MTPModel(nn.Module):
    """Trunk, heads and unembedding; `forward` is the training loss. Parameters are uninitialised: see initial.py.

    Args:
        schedule: "sequential" runs each head's backward right behind its forward (losses/sequential.py); "deferred" leaves all of
            them to the ordinary backward pass. The gradients are the same.
        recompute_trunk: activation checkpointing of each trunk layer. Heads are never recomputed.
        compile_layers: run all layers, trunk and heads, through one compiled function.

    Attributes:
        head_phase: what the engine does around sequential heads; set by the engine.
    """

    def __init__(
        self,
        model: ModelConfig,
        head_loss: HeadLossConfig | None = None,
        schedule: str = "sequential",
        recompute_trunk: bool = False,
        compile_layers: bool = False,
    ):
        super().__init__()
        self.config, self.head_loss_config, self.schedule = model, head_loss or HeadLossConfig(), schedule
        self.head_phase = HeadPhase()
        self.embedding = nn.Embedding(model.vocab_size, model.dim)
        self.trunk = nn.ModuleList(TransformerLayer(model, recompute_trunk, compile_layers) for _ in range(model.num_trunk_layers))
        self.heads = nn.ModuleList(TransformerLayer(model, compiled=compile_layers) for _ in range(model.num_future_tokens))
        self.unembedding = Unembedding(model)

    def forward(
        self, inputs_BT: Tensor, targets_NBT: Tensor, loss_scales: list[float], documents_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of one micro-batch.

        Args:
            inputs_BT: int64 token ids.
            targets_NBT: int64; [i - 1, b, t] is the token i positions after inputs[b, t], or IGNORED.
            loss_scales: factor of each head's summed cross-entropy; it holds the head's weight and the global count of targets.
            documents_BT: int64, rising in each row; attention, of trunk and heads, stays among positions of equal ones. None: it
                does not stop.

        Returns:
            (loss, nll_sums [n]): the sum over heads of scale * cross-entropy, and each head's bare summed negative log-likelihood.
        """
        separation = self._separate(documents_BT)
        z_BTD = self.z(inputs_BT, separation)
        shared_gradient, float8_weight = SharedGradient(num_uses=len(self.heads)), Float8Weight()
        seed, sequential = self.head_phase.seed(), self.schedule == "sequential" and z_BTD.requires_grad

        def head_loss(index: int, z_BTD: Tensor) -> tuple[Tensor, Tensor]:
            return self.unembedding(
                self.heads[index](z_BTD, separation),
                targets_NBT[index],
                scale=loss_scales[index],
                seed=seed,
                seed_is_certain=sequential,
                z_loss=self.head_loss_config.z_loss,
                chunk_rows=self.head_loss_config.chunk_rows,
                shared_gradient=shared_gradient,
                float8_weight=float8_weight if self.head_loss_config.in_float8(index) else None,
            )

        if sequential:
            return SequentialHeadLoss.apply(z_BTD, head_loss, len(self.heads), self.head_phase)
        losses, nll_sums = zip(*(head_loss(index, z_BTD) for index in range(len(self.heads))), strict=True)
        return torch.stack(losses).sum(), torch.stack(nll_sums)

    def z(self, inputs_BT: Tensor, separation: Separation | None = None) -> Tensor:
        """The trunk's output [B, T, D]."""
        z_BTD = self.embedding(inputs_BT)
        for layer in self.trunk:
            z_BTD = layer(z_BTD, separation)
        return z_BTD

    def _separate(self, documents_BT: Tensor | None) -> Separation | None:
        if documents_BT is None:
            return None
        in_blocks = self.trunk[0].compiled and documents_BT.is_cuda
        return separate(documents_BT, self.config, self.embedding.weight.dtype, in_blocks)

    def logits(self, inputs_BT: Tensor) -> Tensor:
        """Logits of every head [N, B, T, V]: large; for inspection and tests."""
        z_BTD = self.z(inputs_BT)
        return torch.stack([self.unembedding(head(z_BTD)) for head in self.heads])

    def next_token_logits(self, inputs_BT: Tensor, caches: list[KeyValueCache] | None) -> tuple[Tensor, list[KeyValueCache]]:
        """Head 1's logits at the last position [B, V], and the key/value caches of the trunk layers and head 1.

        Args:
            inputs_BT: the tokens not yet in the caches.
            caches: what the previous call returned; None at the start.
        """
        hidden_BTD = self.embedding(inputs_BT)
        layers = [*self.trunk, self.heads[0]]
        extended = []
        for layer, cache in zip(layers, caches or [None] * len(layers), strict=True):
            hidden_BTD, cache = layer.extend(hidden_BTD, cache)
            extended.append(cache)
        return self.unembedding(hidden_BTD[:, -1]), extended

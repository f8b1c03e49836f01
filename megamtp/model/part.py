"""Part of a multi-token model: some of its trunk layers, heads and rows of the unembedding. It runs them and makes
their losses.

MTPModel is the part that has everything; a pipeline's stages are parts that share a model out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.losses.float8 import Float8Products, Float8Weight
from megamtp.losses.linear_cross_entropy import SharedGradient
from megamtp.losses.sequential import HeadPhase, PassingHeads, SequentialHeadLoss
from megamtp.losses.vocabulary_slice import slice_gradients, slice_statistics
from megamtp.model.documents import separate
from megamtp.model.heads import Unembedding, head_class
from megamtp.model.layers import Separation, TransformerLayer

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Extent:
    """Which of a model's modules a part has.

    Attributes:
        trunk, heads: indices, from 0. The embedding goes with trunk layer 0, a copy of the final norm with every head.
        rows: of the unembedding: all of them where heads have their losses, a slice where losses are spread by
            vocabulary.
    """

    trunk: range
    heads: range
    rows: range

    @classmethod
    def whole(cls, model: ModelConfig) -> "Extent":
        """Everything."""
        return cls(range(model.num_trunk_layers), range(model.num_future_tokens), range(model.vocab_size))

    @property
    def has_embedding(self) -> bool:
        return 0 in self.trunk


class Numbered(nn.Module, Generic[M]):
    """Modules under their numbers in the whole model: `modules[number]`, and an iteration over the modules."""

    _modules: dict[str, M]  # type: ignore[assignment]  # torch's may hold None

    def __init__(self, modules: Mapping[int, M]):
        super().__init__()
        for number, module in modules.items():
            self.add_module(str(number), module)

    def __getitem__(self, number: int) -> M:
        return self._modules[str(number)]

    def __iter__(self) -> Iterator[M]:
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)


class ModelPart(nn.Module):
    """Modules of a model, with the names they have in the whole one. Parameters are uninitialised: see initial.py.

    Args:
        schedule: "sequential" runs each head's backward right behind its forward (losses/sequential.py); "deferred"
            leaves all of them to the ordinary backward pass. The gradients are the same.
        recompute_trunk: activation checkpointing of each trunk layer. Heads are never recomputed.
        compile_layers: run all layers, trunk and heads, through one compiled function.

    Attributes:
        head_phase: what the engine does around sequential heads; set by the engine.
    """

    def __init__(
        self,
        model: ModelConfig,
        extent: Extent,
        head_loss: HeadLossConfig | None = None,
        schedule: str = "sequential",
        recompute_trunk: bool = False,
        compile_layers: bool = False,
    ):
        super().__init__()
        self.config, self.extent, self.head_loss_config, self.schedule = (
            model,
            extent,
            head_loss or HeadLossConfig(),
            schedule,
        )
        self.compile_layers = compile_layers
        self.head_phase = HeadPhase()
        make_head = head_class(model)
        self.embedding = nn.Embedding(model.vocab_size, model.dim) if extent.has_embedding else None
        self.trunk = Numbered(
            {index: TransformerLayer(model, recompute_trunk, compile_layers) for index in extent.trunk}
        )
        self.heads = Numbered({index: make_head(model, index, compile_layers) for index in extent.heads})
        self.unembedding = (
            Unembedding(model, len(extent.rows), bool(extent.heads)) if extent.heads or extent.rows else None
        )

    @property
    def has_last_head(self) -> bool:
        """Whether z ends here: no later part has a head."""
        return self.config.num_future_tokens - 1 in self.extent.heads

    @property
    def unembedding_weight(self) -> nn.Parameter:
        """[R, D]: the rows that are here, where there are some."""
        assert self.unembedding is not None and self.unembedding.weight is not None
        return self.unembedding.weight

    def separate(self, documents_BT: Tensor | None) -> Separation | None:
        """What the layers need to keep attention inside documents; None if it crosses them."""
        if documents_BT is None:
            return None
        in_blocks = self.compile_layers and documents_BT.is_cuda
        return separate(documents_BT, self.config, next(self.parameters()).dtype, in_blocks)

    def run_trunk(self, x: Tensor, separation: Separation | None = None) -> Tensor:
        """Through the trunk layers that are here.

        Args:
            x: token ids [B, T] if the embedding is here, else what the part before returned, [B, T, D].

        Returns:
            [B, T, D]: z after the last trunk layer.
        """
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.trunk:
            x = layer(x, separation)
        return x

    def losses(
        self, z_BTD: Tensor, targets_NBT: Tensor, loss_scales: list[float], separation: Separation | None = None
    ) -> tuple[Tensor, Tensor]:
        """The losses of the heads that are here, over all rows of the unembedding.

        Args:
            targets_NBT, loss_scales: of all the model's heads; see MTPModel.forward.

        Returns:
            (result, nll_sums): the loss in the part with the last head, in others z for the heads that follow; and the
            summed negative log-likelihood of each head that is here.
        """
        own, settings, unembedding = list(self.extent.heads), self.head_loss_config, self.unembedding
        assert unembedding is not None
        learning = torch.is_grad_enabled() and z_BTD.requires_grad
        sequential = learning and self.schedule == "sequential"
        shared_gradient, float8_weight, seed = SharedGradient(num_uses=len(own)), Float8Weight(), self.head_phase.seed()

        def head_loss(place: int, z_BTD: Tensor) -> tuple[Tensor, Tensor]:
            index = own[place]
            return unembedding(
                self.heads[index](z_BTD, separation),
                targets_NBT[index],
                scale=loss_scales[index],
                seed=seed,
                seed_is_certain=sequential,
                z_loss=settings.z_loss,
                chunk_rows=settings.chunk_rows,
                shared_gradient=shared_gradient,
                float8_weight=float8_weight if settings.in_float8(index) else None,
            )

        if sequential:
            run = SequentialHeadLoss if self.has_last_head else PassingHeads
            return run.apply(z_BTD, head_loss, len(own), self.head_phase)
        losses, nll_sums = zip(*(head_loss(place, z_BTD) for place in range(len(own))), strict=True)
        return torch.stack(losses).sum() if self.has_last_head else z_BTD, torch.stack(nll_sums)

    def normed_heads(self, z_BTD: Tensor, separation: Separation | None = None) -> list[Tensor]:
        """What the heads that are here make of z, normed [B, T, D] each: for losses that are spread over slices."""
        if self.unembedding is None:
            return []
        return [self.unembedding.normed(head(z_BTD, separation)) for head in self.heads]

    def slice_products(
        self, index: int, hidden_ND: Tensor, float8_weight: Float8Weight, factor: float
    ) -> Float8Products | None:
        """The products in fp8 of the rows that are here with a head's hidden states; None if its loss is in the
        model's dtype.
        """
        if not self.head_loss_config.in_float8(index):
            return None
        return float8_weight.products(self.unembedding_weight.detach(), hidden_ND, factor)

    def slice_statistics(
        self, hidden_ND: Tensor, targets_N: Tensor, products: Float8Products | None = None
    ) -> tuple[Tensor, Tensor]:
        """See losses/vocabulary_slice.py, for the rows that are here."""
        return slice_statistics(
            hidden_ND, self.unembedding_weight.detach(), targets_N, self.extent.rows.start, products
        )

    def slice_gradients(
        self,
        logits_NR: Tensor,
        hidden_ND: Tensor,
        targets_N: Tensor,
        log_partition_N: Tensor,
        sum_RD: Tensor,
        factor: float,
        products: Float8Products | None = None,
    ) -> Tensor:
        """See losses/vocabulary_slice.py, for the rows that are here."""
        return slice_gradients(
            logits_NR,
            hidden_ND,
            self.unembedding_weight.detach(),
            targets_N,
            self.extent.rows.start,
            log_partition_N,
            sum_RD,
            factor,
            self.head_loss_config.z_loss,
            products,
        )

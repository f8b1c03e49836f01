"""A part of the multi-token model: some trunk layers, some heads and some rows of the unembedding.

MTPModel (mtp.py) is the part that holds the whole model. Each pipeline stage is also a part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.losses.float8 import Float8Products, Float8Weight
from megamtp.losses.linear_cross_entropy import SharedGradient
from megamtp.losses.sequential import HeadHooks, IntermediateStageHeads, SequentialHeadLoss
from megamtp.losses.vocabulary_slice import slice_gradients, slice_statistics
from megamtp.model.attention import DocumentMask
from megamtp.model.documents import make_document_mask
from megamtp.model.heads import Unembedding, head_class
from megamtp.model.layers import DEFAULT_OPTIONS, LayerOptions, TransformerLayer, weight_groups
from megamtp.precision.weights import WeightQuantiser, quantiser_of

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Extent:
    """The layers, heads and rows of the unembedding that a part holds.

    The part with trunk layer 0 also holds the embedding. Every part with heads holds a copy of the final norm.

    Attributes:
        trunk: indices of trunk layers, from 0.
        heads: indices of heads, from 0: index i - 1 is head i.
        rows: rows of the unembedding: all rows in a part that computes its own heads' losses, a slice in a part of a
            pipeline with spread losses.
    """

    trunk: range
    heads: range
    rows: range

    @classmethod
    def whole(cls, model: ModelConfig) -> "Extent":
        """Returns the extent of the whole model."""
        return cls(range(model.num_trunk_layers), range(model.num_future_tokens), range(model.vocab_size))

    @property
    def has_embedding(self) -> bool:
        return 0 in self.trunk


class NumberedModules(nn.Module, Generic[M]):
    """Layers or heads of a part, under their indices in the whole model.

    The parameters of layer 3 begin with `3.` and `modules[3]` is layer 3, whichever layers the part holds. Iteration
    yields the modules in order.
    """

    _modules: dict[str, M]  # type: ignore[assignment]  # torch's type allows None

    def __init__(self, modules: Mapping[int, M]):
        super().__init__()
        for index, module in modules.items():
            self.add_module(str(index), module)

    def __getitem__(self, index: int) -> M:
        return self._modules[str(index)]

    def __iter__(self) -> Iterator[M]:
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)


class ModelPart(nn.Module):
    """The modules of one part, with the names that they have in the whole model.

    Parameters are uninitialised: see initial.py.

    Args:
        schedule: "sequential" runs the backward pass of each head directly after its forward pass
            (losses/sequential.py); "deferred" leaves the heads to the ordinary backward pass. The gradients are the
            same.
        options: how the layers of trunk and heads run.

    Attributes:
        head_hooks: the engine's hooks around sequential heads. Each engine assigns its own.
    """

    def __init__(
        self,
        model: ModelConfig,
        extent: Extent,
        head_loss: HeadLossConfig | None = None,
        schedule: str = "sequential",
        options: LayerOptions = DEFAULT_OPTIONS,
    ):
        super().__init__()
        self.config, self.extent, self.schedule = model, extent, schedule
        self.head_loss_config = head_loss or HeadLossConfig()
        self.options = options
        self.head_hooks = HeadHooks()
        make_head = head_class(model)
        self.embedding = nn.Embedding(model.vocab_size, model.dim) if extent.has_embedding else None
        self.trunk = NumberedModules({index: TransformerLayer(model, options) for index in extent.trunk})
        head_options = replace(options, recompute=False)
        self.heads = NumberedModules({index: make_head(model, index, head_options) for index in extent.heads})
        self._weight_quantiser: WeightQuantiser | None = None
        self.unembedding = (
            Unembedding(model, len(extent.rows), bool(extent.heads)) if extent.heads or extent.rows else None
        )

    @property
    def has_last_head(self) -> bool:
        """Whether this part holds head n, so that no later part needs z."""
        return self.config.num_future_tokens - 1 in self.extent.heads

    @property
    def unembedding_weight(self) -> nn.Parameter:
        """The part's rows of the unembedding [R, D]; the part must have some."""
        assert self.unembedding is not None and self.unembedding.weight is not None
        return self.unembedding.weight

    def quantise_weights(self) -> None:
        """Quantises the weights that layers use in fp8; call it whenever the weights have changed.

        Each rank must hold the full weights. Under ZeRO-3, GroupedCommunication quantises shards instead.
        """
        groups = weight_groups(self)
        if self._weight_quantiser is None and groups:
            self._weight_quantiser = quantiser_of(
                [(group, [layer.get_parameter(name) for name in group.names]) for layer, group in groups]
            )
        if self._weight_quantiser is not None:
            self._weight_quantiser.update()

    def document_mask(self, documents_BT: Tensor | None) -> DocumentMask | None:
        """Returns the mask for the layers of this part, which keeps attention inside documents; None without documents.

        Args:
            documents_BT: see MTPModel.forward.
        """
        if documents_BT is None:
            return None
        use_block_mask = self.options.compiled and documents_BT.is_cuda
        return make_document_mask(documents_BT, self.config, next(self.parameters()).dtype, use_block_mask)

    def run_trunk(self, x: Tensor, document_mask: DocumentMask | None = None) -> Tensor:
        """Runs the part's trunk layers.

        Args:
            x: token ids [B, T] in the part with the embedding, else the output [B, T, D] of the part before.

        Returns:
            [B, T, D]: the output of the part's last trunk layer; `x` if the part has no trunk layer.
        """
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.trunk:
            x = layer(x, document_mask)
        return x

    def run_heads(
        self, z_BTD: Tensor, targets_nBT: Tensor, loss_scales: list[float], document_mask: DocumentMask | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the part's heads and computes their losses. The part must have all rows of the unembedding.

        Args:
            targets_nBT, loss_scales: of all heads of the model; see MTPModel.forward.

        Returns:
            (loss_or_z, nll_sums): `loss_or_z` is the loss, summed over the part's heads, if the part has the last head,
            else z for the next part; `nll_sums` holds the summed negative log-likelihood of each of the part's heads.
        """
        heads, settings, unembedding = list(self.extent.heads), self.head_loss_config, self.unembedding
        assert unembedding is not None
        sequential = self.schedule == "sequential" and torch.is_grad_enabled() and z_BTD.requires_grad
        shared_gradient, float8_weight = SharedGradient(num_uses=len(heads)), Float8Weight()
        loss_gradient = self.head_hooks.loss_gradient()

        def head_loss(local_index: int, z_BTD: Tensor) -> tuple[Tensor, Tensor]:
            index = heads[local_index]
            return unembedding(
                self.heads[index](z_BTD, document_mask),
                targets_nBT[index],
                scale=loss_scales[index],
                loss_gradient=loss_gradient,
                loss_gradient_is_known=sequential,
                z_loss=settings.z_loss,
                chunk_rows=settings.chunk_rows,
                shared_gradient=shared_gradient,
                float8_weight=float8_weight if settings.in_float8(index) else None,
            )

        if sequential:
            function = SequentialHeadLoss if self.has_last_head else IntermediateStageHeads
            return function.apply(z_BTD, head_loss, len(heads), self.head_hooks)
        losses, nll_sums = zip(*(head_loss(local_index, z_BTD) for local_index in range(len(heads))), strict=True)
        return torch.stack(losses).sum() if self.has_last_head else z_BTD, torch.stack(nll_sums)

    def normed_head_outputs(self, z_BTD: Tensor, document_mask: DocumentMask | None = None) -> list[Tensor]:
        """Returns the output [B, T, D] of each of the part's heads after the final norm, for spread losses."""
        if self.unembedding is None:
            return []
        return [self.unembedding.normed(head(z_BTD, document_mask)) for head in self.heads]

    def slice_products(
        self, index: int, hidden_ND: Tensor, float8_weight: Float8Weight, factor: float
    ) -> Float8Products | None:
        """Returns the object that multiplies the part's rows with a head's hidden states in fp8; None without fp8.

        Args:
            index: index of the head in the whole model, from 0. head_loss.precision may be fp8 for some heads only.
            factor: factor of the gradient with respect to the logits.
        """
        if not self.head_loss_config.in_float8(index):
            return None
        return float8_weight.products(self.unembedding_weight.detach(), hidden_ND, factor)

    def slice_statistics(
        self, hidden_ND: Tensor, targets_N: Tensor, float8_products: Float8Products | None = None
    ) -> tuple[Tensor, Tensor]:
        """Calls losses/vocabulary_slice.py's slice_statistics for the part's rows."""
        return slice_statistics(
            hidden_ND, self.unembedding_weight.detach(), targets_N, self.extent.rows.start, float8_products
        )

    def slice_gradients(
        self,
        logits_NR: Tensor,
        hidden_ND: Tensor,
        targets_N: Tensor,
        log_partition_N: Tensor,
        d_weight_RD: Tensor,
        factor: float,
        float8_products: Float8Products | None = None,
    ) -> Tensor:
        """Calls losses/vocabulary_slice.py's slice_gradients for the part's rows."""
        return slice_gradients(
            logits_NR,
            hidden_ND,
            self.unembedding_weight.detach(),
            targets_N,
            self.extent.rows.start,
            log_partition_N,
            d_weight_RD,
            factor,
            self.head_loss_config.z_loss,
            float8_products,
        )

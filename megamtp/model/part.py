"""A part of the multi-token model: some trunk layers, some heads and some rows of the unembedding.

MTPModel (mtp.py) is the part that holds the whole model. Each pipeline stage is also a part.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.losses.float8 import Float8Products, Float8Weight
from megamtp.losses.linear_cross_entropy import SharedGradient
from megamtp.losses.sequential import AddedLoss, HeadHooks, IntermediateStageHeads, SequentialHeadLoss
from megamtp.losses.vocabulary_slice import slice_gradients, slice_statistics
from megamtp.model.attention import DocumentMask
from megamtp.model.documents import make_document_mask
from megamtp.model.extent import Extent
from megamtp.model.head import Head
from megamtp.model.heads import head_class, head_order
from megamtp.model.layers import DEFAULT_OPTIONS, LayerOptions, TransformerLayer, weight_groups
from megamtp.model.unembedding import Unembedding
from megamtp.precision.weights import WeightQuantiser, quantiser_of

M = TypeVar("M", bound=nn.Module)


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
            (losses/sequential.py); "deferred" leaves the heads to the ordinary backward pass, as heads that read each
            other always are. The gradients are the same. Each loss computes the gradient of its hidden state at once,
            so the logits of two heads never exist at the same time.
        options: how the layers of trunk and heads run.

    Attributes:
        head_order: the indices of the part's heads in the order in which they run.
        unembedding: the one that all heads share; None if each head has its own, or this part needs none.
        unembeddings: those of heads with their own, under the heads' indices.
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
        self.head_class = head_class(model)
        self.head_order = [index for index in head_order(model) if index in extent.heads]
        self.embedding = nn.Embedding(model.vocab_size, model.dim) if extent.has_embedding(model) else None
        self.trunk = NumberedModules({index: TransformerLayer(model, options) for index in extent.trunk})
        self.heads = NumberedModules(self._make_heads(replace(options, recompute=False)))
        self._weight_quantiser: WeightQuantiser | None = None
        self._make_unembeddings()

    def _make_heads(self, options: LayerOptions) -> dict[int, Head]:
        modules = sorted({self.head_class.module_index(self.config, index) for index in self.extent.heads})
        return {index: self.head_class.make(self.config, index, options) for index in modules}

    def _make_unembeddings(self) -> None:
        model, heads, num_rows = self.config, self.extent.heads, len(self.extent.rows)
        is_shared = model.unembedding == "shared"
        needs_one = bool(heads or num_rows)
        self.unembedding = Unembedding(model, num_rows, bool(heads)) if is_shared and needs_one else None
        own = range(0) if is_shared else heads
        if self.extent.spread and num_rows and not is_shared:
            own = range(model.num_future_tokens)
        self.unembeddings = NumberedModules({index: Unembedding(model, num_rows, index in heads) for index in own})

    def head(self, index: int) -> Head:
        """Returns the module of the head at `index` (from 0). Several heads may share one."""
        return self.heads[self.head_class.module_index(self.config, index)]

    @property
    def has_last_head(self) -> bool:
        """Whether this part holds the head that runs last, so that no later part needs the state."""
        return head_order(self.config)[-1] in self.extent.heads

    def unembedding_of(self, index: int) -> Unembedding:
        """Returns the unembedding of the head at `index` (from 0); the part must hold the norm or some rows of it."""
        return self.unembedding or self.unembeddings[index]

    def unembedding_weight(self, index: int) -> nn.Parameter:
        """Returns the part's rows [R, D] of the unembedding of the head at `index`; the part must have some."""
        weight = self.unembedding_of(index).weight
        assert weight is not None
        return weight

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

    def embed(self, inputs_BT: Tensor, following: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Looks tokens up in the part's embedding.

        Args:
            inputs_BT, following: see MTPModel.forward.

        Returns:
            (embeddings of the inputs [B, T, D], and with the tokens after them [B, T + n - 1, D]): the second is None
            if no head reads tokens.
        """
        assert self.embedding is not None
        if not self.head_class.reads_tokens or self.config.num_future_tokens == 1:
            return self.embedding(inputs_BT), None
        assert following is not None, "heads that read tokens need the tokens after the window"
        # Tokens beyond the corpus are IGNORED. Only positions whose targets are also beyond it would read them.
        tokens = torch.cat((inputs_BT, following.clamp(min=0)), dim=1)
        embedded = self.embedding(tokens)
        return embedded[:, : inputs_BT.shape[1]].contiguous(), embedded

    def run_trunk(self, x_BTD: Tensor, document_mask: DocumentMask | None = None) -> Tensor:
        """Runs the part's trunk layers.

        Args:
            x_BTD: the embeddings of the inputs in the part with trunk layer 0, else the output of the part before.

        Returns:
            [B, T, D]: the output of the part's last trunk layer; `x` if the part has no trunk layer.
        """
        for layer in self.trunk:
            x_BTD = layer(x_BTD, document_mask)
        return x_BTD

    def run_heads(
        self,
        state_BTD: Tensor,
        targets_nBT: Tensor,
        loss_scales: list[float],
        document_mask: DocumentMask | None = None,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the part's heads and computes their losses. The part must have all rows of the unembedding.

        Args:
            state_BTD: z, or the state that the part before has returned.
            targets_nBT, loss_scales: of all heads of the model; see MTPModel.forward.
            embedded: the second result of `embed`.

        Returns:
            (loss_or_state, nll_sums): `loss_or_state` is the loss, summed over the part's heads, if the part has the
            head that runs last, else the state for the next part; `nll_sums` holds the summed negative log-likelihood
            of each of the part's heads, by index.
        """
        order, settings = self.head_order, self.head_loss_config
        in_training = torch.is_grad_enabled() and state_BTD.requires_grad
        sequential = self.schedule == "sequential" and in_training and not self.head_class.is_chain
        of_all_heads = (SharedGradient(num_uses=len(order)), Float8Weight()) if self.unembedding else None
        loss_gradient = self.head_hooks.loss_gradient()

        def run_head(place: int, state_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            index = order[place]
            hidden_BTD = self._hidden(index, state_BTD, document_mask, embedded)
            shared_gradient, float8_weight = of_all_heads or (None, Float8Weight())
            loss, nll_sum, normed_BTD = self.unembedding_of(index)(
                hidden_BTD,
                targets_nBT[index],
                scale=loss_scales[index],
                loss_gradient=loss_gradient,
                loss_gradient_is_known=sequential,
                z_loss=settings.z_loss,
                chunk_rows=settings.chunk_rows,
                shared_gradient=shared_gradient,
                float8_weight=float8_weight if settings.in_float8(index) else None,
            )
            return loss, nll_sum, self.head(index).next_state(state_BTD, hidden_BTD, normed_BTD)

        if sequential:
            function = SequentialHeadLoss if self.has_last_head else IntermediateStageHeads
            loss_or_state, nll_sums = function.apply(
                state_BTD, lambda place, z_BTD: run_head(place, z_BTD)[:2], len(order), self.head_hooks
            )
            return loss_or_state, self._by_index(nll_sums)
        return self._run_in_one_graph(run_head, state_BTD, loss_gradient)

    def _run_in_one_graph(
        self, run_head: Callable[[int, Tensor], tuple[Tensor, Tensor, Tensor]], state_BTD: Tensor, loss_gradient: float
    ) -> tuple[Tensor, Tensor]:
        """Returns what `run_heads` returns; the backward pass of all heads follows later.

        Args:
            run_head: (place of a head in head_order, state) -> (loss, summed negative log-likelihood, next state).
        """
        losses, sums = [], []
        for place in range(len(self.head_order)):
            loss, nll_sum, state_BTD = run_head(place, state_BTD)
            losses.append(loss)
            sums.append(nll_sum)
        loss = torch.stack(losses).sum()
        if not self.has_last_head:
            state_BTD = AddedLoss.apply(state_BTD, loss, loss_gradient)
        return loss if self.has_last_head else state_BTD, self._by_index(torch.stack(sums))

    def run_heads_without_losses(
        self, state_BTD: Tensor, document_mask: DocumentMask | None = None, embedded: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs the part's heads, for spread losses.

        Returns:
            (the state for the next part [B, T, D], the output [B, T, D] of each head after the final norm, by index).
        """
        normed = {}
        for index in self.head_order:
            hidden_BTD = self._hidden(index, state_BTD, document_mask, embedded)
            normed[index] = self.unembedding_of(index).normed(hidden_BTD)
            state_BTD = self.head(index).next_state(state_BTD, hidden_BTD, normed[index])
        return state_BTD, [normed[index] for index in self.extent.heads]

    def _hidden(
        self, index: int, state_BTD: Tensor, document_mask: DocumentMask | None, embedded: Tensor | None
    ) -> Tensor:
        """Returns the output [B, T, D] of the head at `index`, before the final norm."""
        head = self.head(index)
        if not head.reads_tokens:
            return head(state_BTD, document_mask)
        assert embedded is not None
        return head(state_BTD, document_mask, self._next_embeddings(index, embedded, state_BTD.shape[1]))

    @staticmethod
    def _next_embeddings(index: int, embedded: Tensor, length: int) -> Tensor:
        """Returns the embeddings [B, T, D] that the head at `index` reads: those of the `index`-th next tokens."""
        return embedded[:, index : index + length]

    def _by_index(self, values: Tensor) -> Tensor:
        """Returns values of the part's heads, which are in the order in which heads run, by index."""
        return values.flip(0) if self.head_class.farthest_first else values

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
        return float8_weight.products(self.unembedding_weight(index).detach(), hidden_ND, factor)

    def slice_statistics(
        self, index: int, hidden_ND: Tensor, targets_N: Tensor, float8_products: Float8Products | None = None
    ) -> tuple[Tensor, Tensor]:
        """Calls losses/vocabulary_slice.py's slice_statistics for the part's rows and the head at `index`."""
        return slice_statistics(
            hidden_ND, self.unembedding_weight(index).detach(), targets_N, self.extent.rows.start, float8_products
        )

    def slice_gradients(
        self,
        index: int,
        logits_NR: Tensor,
        hidden_ND: Tensor,
        targets_N: Tensor,
        log_partition_N: Tensor,
        d_weight_RD: Tensor,
        factor: float,
        float8_products: Float8Products | None = None,
    ) -> Tensor:
        """Calls losses/vocabulary_slice.py's slice_gradients for the part's rows and the head at `index`."""
        return slice_gradients(
            logits_NR,
            hidden_ND,
            self.unembedding_weight(index).detach(),
            targets_N,
            self.extent.rows.start,
            log_partition_N,
            d_weight_RD,
            factor,
            self.head_loss_config.z_loss,
            float8_products,
        )

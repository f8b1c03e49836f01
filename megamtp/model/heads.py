"""The kinds of heads. n heads follow the trunk; their outputs go through the unembedding (unembedding.py).

Head i, counted from 1 as in the paper, predicts the i-th next token; head 1 is the next-token head. Its index in lists
and tensors is i - 1.

Heads run one after another. A state goes through them, and is z at first: each head reads the state, returns a hidden
state for the unembedding, and says what the state is for the next head (`next_state`).

    kind                 heads                                               state for the next head
    parallel             one layer each                                      z
    linear               one matrix each                                     z
    causal               one layer each                                      the head's output
    anticausal           one layer each; head n runs first, head 1 last      the head's output
    chained, deepseek    head 1: a layer; the others: a projection of        the head's output after the final norm
                         [state, embedding of a next token], and a layer
    chained, eagle3      head 1: a layer; the others: a layer whose queries, z after head 1, then the head's output
                         keys and values read [embedding, state]

A head kind is a subclass of Head. `model.head_kind` selects it: a name in HEAD_KINDS, or MODULE:CLASS for a class in a
module of your own.

Sources: Gloeckle et al. 2024, arXiv:2404.19737, section 2 and appendix B; DeepSeek-V3, arXiv:2412.19437, section 2.2;
EAGLE-3, arXiv:2503.01840, section 3.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from megamtp.config import ModelConfig
from megamtp.extensions import find_kind
from megamtp.model.attention import DocumentMask, KeyValueCache
from megamtp.model.head import Head
from megamtp.model.layers import (
    DEFAULT_OPTIONS,
    WEIGHTS,
    Float8Module,
    LayerCost,
    LayerOptions,
    NormWeight,
    TransformerLayer,
    linear,
    rms_norm,
)


class ParallelHead(TransformerLayer, Head):
    """One transformer layer that reads z."""

    def __init__(self, model: ModelConfig, index: int, options: LayerOptions = DEFAULT_OPTIONS):
        TransformerLayer.__init__(self, model, options)


class LinearHead(Float8Module, Head):
    """One matrix that multiplies z. With model.first_head=layer, head 1 is a layer instead."""

    @classmethod
    def make(cls, model: ModelConfig, index: int, options: LayerOptions) -> Head:
        """See Head.make."""
        is_layer = index == 0 and model.first_head == "layer"
        return ParallelHead(model, index, options) if is_layer else cls(model, index, options)

    def __init__(self, model: ModelConfig, index: int, options: LayerOptions = DEFAULT_OPTIONS):
        super().__init__([("matrix.weight",)], options)
        self.matrix = nn.Linear(model.dim, model.dim, bias=False)

    def forward(self, state_BTD: Tensor, document_mask: DocumentMask | None = None) -> Tensor:
        """See Head.forward."""
        (quantised,) = self.quantised or (None,)
        return linear(state_BTD, self.matrix.weight, quantised)

    def cost(self, sequence_length: int) -> LayerCost:
        """See Head.cost."""
        dim = self.matrix.in_features
        return LayerCost(2 * dim * dim, 0, dim, dim, float8_kept_bytes=3 * dim)

    def extend(self, state_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        """See Head.extend. The cache is empty."""
        return self(state_BTD), cache or (state_BTD[:, :0], state_BTD[:, :0])


class CausalHead(ParallelHead):
    """One transformer layer. Head 1 reads z, and head i + 1 reads the output of head i."""

    is_chain = True

    def next_state(self, state_BTD: Tensor, hidden_BTD: Tensor, normed_BTD: Tensor) -> Tensor:
        """See Head.next_state."""
        return hidden_BTD


class AnticausalHead(CausalHead):
    """One transformer layer. Head n reads z, and head i reads the output of head i + 1. Trunk and heads are a Llama."""

    farthest_first = True


class ChainedHead(Head):
    """Makes the heads of the kind `chained`: head 1 is a layer, and the others have the form of model.chain_form."""

    is_chain = reads_tokens = True

    @classmethod
    def make(cls, model: ModelConfig, index: int, options: LayerOptions) -> Head:
        """See Head.make."""
        classes: dict[str, tuple[type[Head], type[Head]]] = {
            "deepseek": (DeepSeekFirst, DeepSeekDepth),
            "eagle3": (ParallelHead, EagleDepth),
        }
        first, others = classes[model.chain_form]
        return (others if index else first)(model, index, options)

    @classmethod
    def module_index(cls, model: ModelConfig, index: int) -> int:
        """See Head.module_index."""
        return min(index, 1) if model.shares_chain_weights else index


class DeepSeekFirst(ParallelHead):
    """Head 1 of DeepSeek's chain: a layer whose output, after the final norm, the first depth reads."""

    def next_state(self, state_BTD: Tensor, hidden_BTD: Tensor, normed_BTD: Tensor) -> Tensor:
        """See Head.next_state."""
        return normed_BTD


class DeepSeekDepth(Float8Module, Head):
    """A depth of DeepSeek's chain: a layer that reads projection([norm(state), norm(embedding of a next token)]).

    Source: DeepSeek-V3, arXiv:2412.19437, equations 21 to 23.
    """

    reads_tokens = True

    def __init__(self, model: ModelConfig, index: int, options: LayerOptions = DEFAULT_OPTIONS):
        super().__init__([("projection.weight",)], options)
        self.state_norm, self.embedding_norm = NormWeight(model.dim), NormWeight(model.dim)
        self.projection = nn.Linear(2 * model.dim, model.dim, bias=False)
        self.layer = TransformerLayer(model, options)

    def forward(  # type: ignore[override]  # reads_tokens
        self, state_BTD: Tensor, document_mask: DocumentMask | None, next_BTD: Tensor
    ) -> Tensor:
        """See Head.forward."""
        return self.layer(self._projected(state_BTD, next_BTD), document_mask)

    def next_state(self, state_BTD: Tensor, hidden_BTD: Tensor, normed_BTD: Tensor) -> Tensor:
        """See Head.next_state."""
        return normed_BTD

    def cost(self, sequence_length: int) -> LayerCost:
        """See Head.cost. Besides what the layer keeps, the inputs of both norms and of the projection are kept."""
        layer, (dim, input_dim) = self.layer.cost(sequence_length), self.projection.weight.shape
        return replace(
            layer,
            matrix_flops=layer.matrix_flops + 2 * dim * input_dim,
            kept_elements=layer.kept_elements + 2 * input_dim,
            streamed_elements=layer.streamed_elements + dim,
            float8_kept_bytes=(layer.float8_kept_bytes or 0) + 3 * input_dim,
        )

    def extend(  # type: ignore[override]  # reads_tokens
        self, state_BTD: Tensor, cache: KeyValueCache | None, next_BTD: Tensor
    ) -> tuple[Tensor, KeyValueCache]:
        """See Head.extend."""
        return self.layer.extend(self._projected(state_BTD, next_BTD), cache)

    def _projected(self, state_BTD: Tensor, next_BTD: Tensor) -> Tensor:
        eps = self.layer.eps
        normed_state_BTD = rms_norm(state_BTD, self.state_norm.weight, eps)
        normed_next_BTD = rms_norm(next_BTD, self.embedding_norm.weight, eps)
        (quantised,) = self.quantised or (None,)
        return linear(torch.cat((normed_state_BTD, normed_next_BTD), dim=-1), self.projection.weight, quantised)


class EagleDepth(TransformerLayer, Head):
    """EAGLE-3's draft layer: queries, keys and values read [norm(embedding of a next token), norm(state)].

    The state is also the input of the residual stream. The weights belong to all of heads 2 to n.

    Source: Li et al. 2025, arXiv:2503.01840, section 3; vLLM's LlamaForCausalLMEagle3 computes the same.
    """

    reads_tokens = True
    parameter_order = (*WEIGHTS, "embedding_norm.weight")

    def __init__(self, model: ModelConfig, index: int, options: LayerOptions = DEFAULT_OPTIONS):
        TransformerLayer.__init__(self, model, options, attention_inputs=2)
        self.embedding_norm = NormWeight(model.dim)

    def next_state(self, state_BTD: Tensor, hidden_BTD: Tensor, normed_BTD: Tensor) -> Tensor:
        """See Head.next_state."""
        return hidden_BTD


HEAD_KINDS: Mapping[str, type[Head]] = {
    "parallel": ParallelHead,
    "linear": LinearHead,
    "causal": CausalHead,
    "anticausal": AnticausalHead,
    "chained": ChainedHead,
}


def head_class(model: ModelConfig) -> type[Head]:
    """Returns the class that `model.head_kind` names.

    Raises:
        InputError: see find_kind.
    """
    return find_kind(model.head_kind, HEAD_KINDS, Head, "model.head_kind")


def head_order(model: ModelConfig) -> range:
    """Returns the indices of all heads in the order in which they run. Raises InputError: see find_kind."""
    indices = range(model.num_future_tokens)
    return indices[::-1] if head_class(model).farthest_first else indices

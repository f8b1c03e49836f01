"""EAGLE-3's draft layer, as heads 2 to n of the kind `chained`.

Tests: tests/unit/model/test_heads.py.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megamtp.config import ModelConfig
from megamtp.model.attention import DocumentMask, KeyValueCache, attention
from megamtp.model.head import Head
from megamtp.model.layers import (
    DEFAULT_OPTIONS,
    WEIGHTS,
    LayerOptions,
    NormWeight,
    QuantisedLayer,
    TransformerLayer,
    add_norm_mlp,
    linear,
    linears,
    rms_norm,
)


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

    def forward(  # type: ignore[override]  # reads_tokens
        self, state_BTD: Tensor, document_mask: DocumentMask | None, next_BTD: Tensor
    ) -> Tensor:
        """See Head.forward."""
        return self.run(eagle_output, document_mask, state_BTD, next_BTD)

    def next_state(self, state_BTD: Tensor, hidden_BTD: Tensor, normed_BTD: Tensor) -> Tensor:
        """See Head.next_state."""
        return hidden_BTD

    def extend(  # type: ignore[override]  # reads_tokens
        self, state_BTD: Tensor, cache: KeyValueCache | None, next_BTD: Tensor
    ) -> tuple[Tensor, KeyValueCache]:
        """See Head.extend."""
        rotary = self.rotary(cache[0].shape[2] if cache else 0, state_BTD)
        return eagle_layer(state_BTD, next_BTD, self.weights, rotary, self.head_dim, self.eps, cache)


def eagle_layer(
    state_BTD: Tensor,
    next_BTD: Tensor,
    weights: tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor],
    head_dim: int,
    eps: float,
    cache: KeyValueCache | None = None,
    mask: Tensor | BlockMask | None = None,
    quantised: QuantisedLayer | None = None,
) -> tuple[Tensor, KeyValueCache]:
    """Returns EagleDepth's (output, keys and values of all positions). See transformer_layer for the arguments."""
    state_norm, query, key, value, output, mlp_norm, gate, up, down, embedding_norm = weights
    query_key_value8, output8, gate_up8, down8 = quantised or (None, None, None, None)
    inputs = torch.cat((rms_norm(next_BTD, embedding_norm, eps), rms_norm(state_BTD, state_norm, eps)), dim=-1)
    queries, keys, values = linears(inputs, (query, key, value), query_key_value8)
    attended_BTD, cache = attention(queries, keys, values, rotary, head_dim, cache, mask)
    attended_BTD = linear(attended_BTD, output, output8)
    return add_norm_mlp(state_BTD, attended_BTD, mlp_norm, gate, up, down, eps, gate_up8, down8), cache


def eagle_output(
    state_BTD: Tensor,
    next_BTD: Tensor,
    weights: tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor],
    head_dim: int,
    eps: float,
    mask: Tensor | BlockMask | None = None,
    quantised: QuantisedLayer | None = None,
) -> Tensor:
    """Returns eagle_layer's output without keys and values: the function that training compiles."""
    return eagle_layer(state_BTD, next_BTD, weights, rotary, head_dim, eps, mask=mask, quantised=quantised)[0]

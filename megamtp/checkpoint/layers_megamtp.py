"""The configuration and the layers of modeling_megamtp.py, which imports this file from its own folder.

Shapes: B batch, T new positions, S all positions, D hidden size, H attention heads, K their dimension.

Tests: tests/unit/checkpoint/test_modeling_megamtp.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

# Takes the keys and values of new positions [B, H, T, K], and returns those of all positions [B, H, S, K].
UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class MegamtpConfig(PretrainedConfig):
    """The configuration of MegamtpForCausalLM.

    Args:
        num_hidden_layers: the layers that run one after another up to head 1: those of the trunk, plus one for head 1.
            With anticausal heads, plus one for each head. If head 1 is a matrix, only those of the trunk.
        num_future_tokens: the number of heads, n.
        head_kind: parallel, linear, causal, anticausal or chained.
        first_head: linear: head 1 is a layer, or the same as the other heads.
        chain_form: chained: deepseek or eagle3.
        chain_weights: chained: own, each of heads 2 to n has weights; or shared, one module is used n - 1 times.
        unembedding: shared, or replicated: each head has its own final norm and projection to the vocabulary.
        others: megamtp also keeps its own num_layers and match_parameters here, from which this model reads nothing.
    """

    model_type = "megamtp"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers declares it as a list

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 29,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        num_future_tokens: int = 4,
        head_kind: str = "parallel",
        first_head: str = "same",
        chain_form: str = "deepseek",
        chain_weights: str | None = None,
        unembedding: str = "shared",
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        hidden_act: str = "silu",
        tie_word_embeddings: bool = False,
        **others: Any,
    ):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_future_tokens = num_hidden_layers, num_future_tokens
        self.head_kind, self.first_head = head_kind, first_head
        self.chain_form, self.chain_weights, self.unembedding = chain_form, chain_weights, unembedding
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps, self.rope_theta, self.hidden_act = rms_norm_eps, rope_theta, hidden_act
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **others})

    @property
    def first_head_is_matrix(self) -> bool:
        return self.head_kind == "linear" and self.first_head == "same"

    @property
    def num_trunk_layers(self) -> int:
        if self.head_kind == "anticausal":
            return self.num_hidden_layers - self.num_future_tokens
        return self.num_hidden_layers - (0 if self.first_head_is_matrix else 1)

    @property
    def num_extra_heads(self) -> int:
        """The number of modules of heads 2 to n that are not among the layers up to head 1."""
        if self.head_kind == "anticausal":
            return 0
        num_others = self.num_future_tokens - 1
        return min(num_others, 1) if self.head_kind == "chained" and self.chain_weights == "shared" else num_others


class RMSNorm(nn.Module):
    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: MegamtpConfig, input_dim: int):
        super().__init__()
        query_dim = config.num_attention_heads * config.head_dim
        key_value_dim = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(input_dim, query_dim, bias=False)
        self.k_proj = nn.Linear(input_dim, key_value_dim, bias=False)
        self.v_proj = nn.Linear(input_dim, key_value_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=False)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, update_cache: UpdateCache
    ) -> Tensor:
        queries, keys, values = (
            projection(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries = rotate(queries, *rotary)
        keys, values = update_cache(rotate(keys, *rotary), values)
        keys, values = (tensor.repeat_interleave(self.queries_per_key, dim=1) for tensor in (keys, values))
        outputs = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(outputs.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer layer: of the trunk, or a head."""

    attention_inputs = 1  # vectors of width D that queries, keys and values read

    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, self.attention_inputs * config.hidden_size)
        self.post_attention_layernorm, self.mlp = RMSNorm(config), SwiGLU(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        update_cache: UpdateCache,
        next_BTD: Tensor | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.attention_input(x_BTD, next_BTD), rotary, mask, update_cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))

    def attention_input(self, x_BTD: Tensor, next_BTD: Tensor | None) -> Tensor:
        return self.input_layernorm(x_BTD)


class Body(nn.Module):
    """The embedding, the layers up to head 1 and the final norm, with the module names of a Llama."""

    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


class MatrixHead(nn.Module):
    """A linear head: one matrix."""

    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.matrix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, *unused: Any) -> Tensor:
        return self.matrix(x_BTD)


class DeepSeekHead(nn.Module):
    """A later head of DeepSeek's chain: a layer of projection([norm(state), norm(embedding of a next token)])."""

    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.state_norm, self.embedding_norm = RMSNorm(config), RMSNorm(config)
        self.projection = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = Layer(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        update_cache: UpdateCache,
        next_BTD: Tensor,
    ) -> Tensor:
        inputs = torch.cat((self.state_norm(x_BTD), self.embedding_norm(next_BTD)), dim=-1)
        return self.layer(self.projection(inputs), rotary, mask, update_cache)


class EagleHead(Layer):
    """A later head of EAGLE-3's chain: queries, keys and values read [norm(embedding of a next token), norm(state)]."""

    attention_inputs = 2

    def __init__(self, config: MegamtpConfig):
        super().__init__(config)
        self.embedding_norm = RMSNorm(config)

    def attention_input(self, x_BTD: Tensor, next_BTD: Tensor | None) -> Tensor:
        assert next_BTD is not None
        return torch.cat((self.embedding_norm(next_BTD), self.input_layernorm(x_BTD)), dim=-1)


class OwnUnembedding(nn.Module):
    """A head's own final norm and projection to the vocabulary."""

    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.norm, self.lm_head = RMSNorm(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)


def make_extra_unembeddings(config: MegamtpConfig) -> nn.ModuleList:
    """Returns the unembeddings of heads 2 to n; none if all heads share one."""
    num_others = config.num_future_tokens - 1 if config.unembedding == "replicated" else 0
    return nn.ModuleList(OwnUnembedding(config) for _ in range(num_others))


def make_extra_heads(config: MegamtpConfig) -> nn.ModuleList:
    """Returns the modules of heads 2 to n that are not among the layers up to head 1."""
    kinds: dict[str, type[nn.Module]] = {"linear": MatrixHead, "deepseek": DeepSeekHead, "eagle3": EagleHead}
    kind = kinds.get(config.chain_form if config.head_kind == "chained" else config.head_kind, Layer)
    return nn.ModuleList(kind(config) for _ in range(config.num_extra_heads))


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding: rotates each pair (k, k + K/2) by the angle of its position."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos + torch.cat((-second, first), dim=-1) * sin

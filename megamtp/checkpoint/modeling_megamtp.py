"""A multi-token model for transformers: a Llama whose trunk feeds n heads, each one more layer. This file needs torch
and transformers alone.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(ids, max_new_tokens=100)                  # head 1, as any causal language model
    model.generate_with_heads(ids, max_new_tokens=100)       # the same greedy text: heads 2 to n draft, head 1 verifies
    model.head_logits(ids)                                   # [n, B, T, V]: head i predicts the i-th next token

The last of `model.layers` is head 1; heads 2 to n are `extra_heads`. Source: Gloeckle et al. 2024, arXiv:2404.19737;
drafting: Stern et al. 2018, arXiv:1811.03115. Shapes: B batch, T new positions, S all positions, D width, H heads, K
their width, V tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# takes new keys and values [B, H, T, K], returns those of all positions
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class MegamtpConfig(PretrainedConfig):
    """`num_hidden_layers` counts the trunk and head 1; `num_future_tokens` is n."""

    model_type = "megamtp"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers has it

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
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        hidden_act: str = "silu",
        tie_word_embeddings: bool = False,
        **others: Any,
    ):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_future_tokens = num_hidden_layers, num_future_tokens
        self.num_attention_heads, self.num_key_value_heads = (
            num_attention_heads,
            num_key_value_heads or num_attention_heads,
        )
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings, self.rms_norm_eps, self.rope_theta = (
            max_position_embeddings,
            rms_norm_eps,
            rope_theta,
        )
        self.hidden_act = hidden_act
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **others})


class RMSNorm(nn.Module):
    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: MegamtpConfig):
        super().__init__()
        width, key_value_width = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.head_dim, self.groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, extend: Extend) -> Tensor:
        queries, keys, values = (
            projection(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries = rotate(queries, *rotary)
        keys, values = extend(rotate(keys, *rotary), values)
        keys, values = (part.repeat_interleave(self.groups, dim=1) for part in (keys, values))
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(config), Attention(config)
        self.post_attention_layernorm, self.mlp = RMSNorm(config), SwiGLU(config)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, extend: Extend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, mask, extend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Body(nn.Module):
    """Embedding, trunk, head 1 and the final norm, under the names that a Llama has."""

    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


class MegamtpForCausalLM(PreTrainedModel, GenerationMixin):
    """See the file's beginning."""

    config_class = MegamtpConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012 - as transformers has it
    _supports_sdpa = True

    def __init__(self, config: MegamtpConfig):
        super().__init__(config)
        self.model = Body(config)
        self.extra_heads = nn.ModuleList(Layer(config) for _ in range(config.num_future_tokens - 1))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> tuple[Any, ...] | CausalLMOutputWithPast:
        """Head 1's logits [B, T, V], and with labels [B, T] the loss of the next token. Other arguments are not looked
        at.

        Args:
            logits_to_keep: of the last positions alone, or of those with these indices; 0: of all.
            num_items_in_batch: what the sum of losses is divided by, as Trainer asks for over several batches; None:
                the mean.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x_BTD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        rotary, mask = self._positions(x_BTD, past, attention_mask, position_ids)
        for index, layer in enumerate(self.model.layers):
            x_BTD = layer(x_BTD, rotary, mask, _extend_with(past_key_values, index))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(x_BTD[:, kept])
        loss = None
        if labels is not None:
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction=reduction)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def head_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Every head's logits [n, B, T, V]: head i, at index i - 1, predicts the i-th next token."""
        x_BTD = self.model.embed_tokens(input_ids)
        rotary, mask = self._positions(x_BTD, 0, attention_mask, None)
        for layer in self.model.layers[:-1]:
            x_BTD = layer(x_BTD, rotary, mask, _keep)
        heads = [self.model.layers[-1], *self.extra_heads]
        return torch.stack([self._logits(head(x_BTD, rotary, mask, _keep)) for head in heads])

    @torch.no_grad()
    def generate_with_heads(
        self, input_ids: Tensor, max_new_tokens: int = 20, num_heads: int | None = None, eos_token_id: int | None = None
    ) -> tuple[Tensor, int]:
        """Head 1's greedy text in fewer passes: what the other heads have drafted is verified all at once.

        In fp32 it is generate()'s. In 16 bits, where several tokens at a time are rounded otherwise than one, near ties
        may fall otherwise, as they may with and without a cache.

        Args:
            input_ids: [1, T].
            num_heads: 1 to n heads to use; None: all.
            eos_token_id: ends the text; None: the generation configuration's.

        Returns:
            (ids [1, T + new tokens], the number of forward passes).
        """
        if input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids is {list(input_ids.shape)}; expected one text, [1, T]")
        ends = self.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        ends = set(ends if isinstance(ends, (list, tuple)) else [ends])
        drafting = _Drafting(self, len(self.extra_heads) + 1 if num_heads is None else num_heads)
        known, length, passes = input_ids[0].tolist(), input_ids.shape[1] + max_new_tokens, 0
        drafts: list[int] = []
        while len(known) < length:
            accepted, drafts = drafting.step(known, drafts)
            passes += 1
            for token in accepted[: length - len(known)]:
                known.append(token)
                if token in ends:
                    length = len(known)
                    break
        return torch.tensor([known], device=input_ids.device), passes

    def _logits(self, x: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(x))

    def _positions(
        self, x_BTD: Tensor, past: int, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """((cos, sin) [B, 1, T, K] of the new positions, mask [B, 1, T, S], True where a query looks; None: causal)."""
        length, device = x_BTD.shape[1], x_BTD.device
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=device)[None]
        frequencies = self.config.rope_theta ** (
            -torch.arange(0, self.config.head_dim, 2, device=device, dtype=torch.float32) / self.config.head_dim
        )
        angles = position_ids[:, None, :, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        rotary = angles.cos().to(x_BTD.dtype), angles.sin().to(x_BTD.dtype)
        if past == 0 and attention_mask is None:
            return rotary, None
        mask = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)[None, None]
        if attention_mask is not None:
            own = torch.eye(length, past + length, dtype=torch.bool, device=device).roll(past, dims=1)
            # padding looks at itself, or at nothing
            mask = mask & attention_mask[:, None, None, : past + length].bool() | own
        return rotary, mask


class _Drafting:
    """Steps of drafting and verifying, and the keys and values of every layer used: those of the verified tokens
    alone.
    """

    def __init__(self, model: MegamtpForCausalLM, num_heads: int):
        if not 1 <= num_heads <= len(model.extra_heads) + 1:
            raise ValueError(f"num_heads is {num_heads}; expected 1 to {len(model.extra_heads) + 1}")
        self.model, self.trunk = model, model.model.layers[:-1]
        self.heads = [model.model.layers[-1], *model.extra_heads[: num_heads - 1]]
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, trunk first

    def step(self, known: list[int], drafts: list[int]) -> tuple[list[int], list[int]]:
        """One pass over the tokens not yet in the cache, and the drafts behind them: (new tokens, new drafts)."""
        past = self.cache[0][0].shape[2] if self.cache else 0
        pending = torch.tensor([known[past:] + drafts], device=self.model.device)
        x_BTD = self.model.model.embed_tokens(pending)
        rotary, mask = self.model._positions(x_BTD, past, None, None)
        for index, layer in enumerate(self.trunk):
            x_BTD = layer(x_BTD, rotary, mask, lambda *new, index=index: self._extend(index, *new))
        outputs = [
            head(x_BTD, rotary, mask, lambda *new, index=index: self._extend(index, *new))
            for index, head in enumerate(self.heads, start=len(self.trunk))
        ]
        first = pending.shape[1] - len(drafts) - 1  # the last known token
        greedy = self.model._logits(outputs[0][0, first:]).argmax(-1).tolist()
        num_right = 0
        while num_right < len(drafts) and drafts[num_right] == greedy[num_right]:
            num_right += 1
        last = torch.stack([output[0, first + num_right] for output in outputs[1:]]) if outputs[1:] else None
        length = len(known) + num_right
        self.cache = {
            index: (keys[:, :, :length], values[:, :, :length]) for index, (keys, values) in self.cache.items()
        }
        return greedy[: num_right + 1], [] if last is None else self.model._logits(last).argmax(-1).tolist()

    def _extend(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if index in self.cache:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.cache[index], (keys, values)))  # noqa: B905
        self.cache[index] = keys, values
        return keys, values


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (k, k + K/2) by its position's angle."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos + torch.cat((-second, first), dim=-1) * sin


def _keep(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys, values


def _extend_with(cache: Cache | None, index: int) -> Extend:
    if cache is None:
        return _keep
    return lambda keys, values: cache.update(keys, values, index)

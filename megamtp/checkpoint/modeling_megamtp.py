"""A multi-token prediction model for transformers: a Llama with n heads on a shared trunk.

Head i predicts the i-th next token. Each head is one transformer layer, and all heads share the final norm and the
unembedding. Head 1 is the last of `model.layers`; heads 2 to n are `extra_heads`. This file requires only torch and
transformers.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(ids, max_new_tokens=100)               # uses head 1, like any causal language model
    model.generate_with_heads(ids, max_new_tokens=100)    # the same greedy text in fewer forward passes
    model.head_logits(ids)                                # logits of all heads, [n, B, T, V]

Shapes: B batch, T new positions, S all positions, D hidden size, H attention heads, K their dimension, V vocabulary.
Source: Gloeckle et al. 2024, arXiv:2404.19737; for drafting: Stern et al. 2018, arXiv:1811.03115.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Takes the keys and values of new positions [B, H, T, K], and returns those of all positions [B, H, S, K].
UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class MegamtpConfig(PretrainedConfig):
    """The configuration of MegamtpForCausalLM.

    Args:
        num_hidden_layers: the layers of the trunk, plus one for head 1.
        num_future_tokens: the number of heads, n.
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
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        hidden_act: str = "silu",
        tie_word_embeddings: bool = False,
        **others: Any,
    ):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_future_tokens = num_hidden_layers, num_future_tokens
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps, self.rope_theta, self.hidden_act = rms_norm_eps, rope_theta, hidden_act
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
        query_dim = config.num_attention_heads * config.head_dim
        key_value_dim = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_dim, bias=False)
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
    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(config), Attention(config)
        self.post_attention_layernorm, self.mlp = RMSNorm(config), SwiGLU(config)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, update_cache: UpdateCache
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, mask, update_cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Body(nn.Module):
    """The embedding, the trunk, head 1 and the final norm, with the module names of a Llama."""

    def __init__(self, config: MegamtpConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


class MegamtpForCausalLM(PreTrainedModel, GenerationMixin):
    """A Llama with n heads on a shared trunk. See the module's docstring."""

    config_class = MegamtpConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012 - transformers declares it as a list
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
        """Computes the logits of head 1, [B, T, V], and its next-token loss if labels are given.

        Args:
            input_ids: [B, T].
            labels: [B, T], not shifted; -100 is ignored.
            logits_to_keep: how many of the last positions to compute logits for (0: all), or the indices of positions.
            num_items_in_batch: the sum of losses is divided by this number, which Trainer passes for gradient
                accumulation. None: the loss is the mean.
            others: ignored.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x_BTD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        rotary, mask = self._positions(x_BTD, past, attention_mask, position_ids)
        for index, layer in enumerate(self.model.layers):
            x_BTD = layer(x_BTD, rotary, mask, _update_of(past_key_values, index))
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
        """Returns the logits of all heads, [n, B, T, V]. Head i, at index i - 1, predicts the i-th next token."""
        x_BTD = self.model.embed_tokens(input_ids)
        rotary, mask = self._positions(x_BTD, 0, attention_mask, None)
        for layer in self.model.layers[:-1]:
            x_BTD = layer(x_BTD, rotary, mask, _without_cache)
        heads = [self.model.layers[-1], *self.extra_heads]
        return torch.stack([self._logits(head(x_BTD, rotary, mask, _without_cache)) for head in heads])

    @torch.no_grad()
    def generate_with_heads(
        self, input_ids: Tensor, max_new_tokens: int = 20, num_heads: int | None = None, eos_token_id: int | None = None
    ) -> tuple[Tensor, int]:
        """Generates greedy text in fewer forward passes: heads 2 to n draft tokens, and head 1 verifies them together.

        In fp32, the text equals that of generate(do_sample=False). In 16 bits, several tokens in one pass are rounded
        differently from one token at a time, so near ties between two tokens may be resolved differently.

        Args:
            input_ids: [1, T]; a single text.
            num_heads: the number of heads to use, 1 to n; None: all.
            eos_token_id: the token that ends the text; None: that of the generation configuration.

        Returns:
            (ids [1, T + number of new tokens], number of forward passes).
        """
        if input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}; expected a single text, [1, T]")
        end_ids = self.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        end_ids = set(end_ids if isinstance(end_ids, (list, tuple)) else [end_ids])
        decoder = _DraftingDecoder(self, len(self.extra_heads) + 1 if num_heads is None else num_heads)
        ids, length, num_passes = input_ids[0].tolist(), input_ids.shape[1] + max_new_tokens, 0
        drafts: list[int] = []
        while len(ids) < length:
            verified, drafts = decoder.step(ids, drafts)
            num_passes += 1
            for token in verified[: length - len(ids)]:
                ids.append(token)
                if token in end_ids:
                    length = len(ids)
                    break
        return torch.tensor([ids], device=input_ids.device), num_passes

    def _logits(self, x: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(x))

    def _positions(
        self, x_BTD: Tensor, past: int, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Returns the rotary embedding and the attention mask of the new positions.

        Returns:
            ((cos, sin), each [B, 1, T, K]; mask [B, 1, T, S], True where a query may attend, or None: causal).
        """
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
            diagonal = torch.eye(length, past + length, dtype=torch.bool, device=device).roll(past, dims=1)
            # Padding positions attend to themselves. Without any key, their softmax would be NaN.
            mask = mask & attention_mask[:, None, None, : past + length].bool() | diagonal
        return rotary, mask


class _DraftingDecoder:
    """Decodes one text by drafting and verifying.

    Attributes:
        cache: keys and values [1, H, S, K] of each layer in use (the trunk first), only of verified tokens.
    """

    def __init__(self, model: MegamtpForCausalLM, num_heads: int):
        if not 1 <= num_heads <= len(model.extra_heads) + 1:
            raise ValueError(f"num_heads is {num_heads}; expected 1 to {len(model.extra_heads) + 1}")
        self.model, self.trunk = model, model.model.layers[:-1]
        self.heads = [model.model.layers[-1], *model.extra_heads[: num_heads - 1]]
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self, ids: list[int], drafts: list[int]) -> tuple[list[int], list[int]]:
        """Verifies the drafts of the previous step in one forward pass.

        Args:
            ids: the text so far.
            drafts: candidates for the tokens after `ids`.

        Returns:
            (verified tokens, new drafts for the tokens after them). There is at least one verified token.
        """
        past = self.cache[0][0].shape[2] if self.cache else 0
        pending = torch.tensor([ids[past:] + drafts], device=self.model.device)
        x_BTD = self.model.model.embed_tokens(pending)
        rotary, mask = self.model._positions(x_BTD, past, None, None)
        for index, layer in enumerate(self.trunk):
            x_BTD = layer(x_BTD, rotary, mask, lambda *new, index=index: self._update_cache(index, *new))
        outputs = [
            head(x_BTD, rotary, mask, lambda *new, index=index: self._update_cache(index, *new))
            for index, head in enumerate(self.heads, start=len(self.trunk))
        ]
        last = pending.shape[1] - len(drafts) - 1  # position of the last token of `ids`
        greedy = self.model._logits(outputs[0][0, last:]).argmax(-1).tolist()
        num_accepted = 0
        while num_accepted < len(drafts) and drafts[num_accepted] == greedy[num_accepted]:
            num_accepted += 1
        drafting = torch.stack([output[0, last + num_accepted] for output in outputs[1:]]) if outputs[1:] else None
        length = len(ids) + num_accepted
        self.cache = {
            index: (keys[:, :, :length], values[:, :, :length]) for index, (keys, values) in self.cache.items()
        }
        new_drafts = [] if drafting is None else self.model._logits(drafting).argmax(-1).tolist()
        return greedy[: num_accepted + 1], new_drafts

    def _update_cache(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if index in self.cache:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.cache[index], (keys, values)))  # noqa: B905
        self.cache[index] = keys, values
        return keys, values


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding: rotates each pair (k, k + K/2) by the angle of its position."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos + torch.cat((-second, first), dim=-1) * sin


def _without_cache(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys, values


def _update_of(cache: Cache | None, index: int) -> UpdateCache:
    """Returns the cache update of a layer."""
    if cache is None:
        return _without_cache
    return lambda keys, values: cache.update(keys, values, index)

"""A multi-token prediction model for transformers: a Llama with n heads on a shared trunk.

Head i predicts the i-th next token. All heads share the final norm and the unembedding, or heads 2 to n have their own,
`extra_unembeddings`. Head 1 is the last of `model.layers`; heads 2 to n are `extra_heads`. This file requires only
torch, transformers, and layers_megamtp.py beside it.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(ids, max_new_tokens=100)               # uses head 1, like any causal language model
    model.generate_with_heads(ids, max_new_tokens=100)    # the same greedy text in fewer forward passes
    model.head_logits(ids)                                # logits of all heads, [n, B, T, V]

A state goes through the heads, and is the trunk's output z at first. config.head_kind says what the heads are:

    parallel      one layer each, which reads z
    linear        one matrix each, which reads z. Head 1 is `first_head` if it is a matrix, too
    causal        one layer each, which reads the output of the head before; head 1 reads z
    anticausal    one layer each; head n reads z, head i reads the output of head i + 1. All are in `model.layers`
    chained       head 1 is a layer. Head i > 1 reads the output of head i - 1 and the embedding of the (i - 1)-th next
                  token: DeepSeekHead or EagleHead

Shapes: B batch, T new positions, S all positions, D hidden size, H attention heads, K their dimension, V vocabulary.
Sources: Gloeckle et al. 2024, arXiv:2404.19737; DeepSeek-V3, arXiv:2412.19437; EAGLE-3, arXiv:2503.01840; for drafting:
Stern et al. 2018, arXiv:1811.03115.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Relative, because transformers copies both files out of the exported folder.
from .layers_megamtp import Body, MatrixHead, MegamtpConfig, UpdateCache, make_extra_heads, make_extra_unembeddings


class MegamtpForCausalLM(PreTrainedModel, GenerationMixin):
    """A Llama with n heads on a shared trunk. See the module's docstring."""

    config_class = MegamtpConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer", "DeepSeekHead", "EagleHead"]  # noqa: RUF012 - transformers declares it as a list
    _supports_sdpa = True

    def __init__(self, config: MegamtpConfig):
        super().__init__(config)
        self.model = Body(config)
        self.first_head = MatrixHead(config) if config.first_head_is_matrix else None
        self.extra_heads, self.extra_unembeddings = make_extra_heads(config), make_extra_unembeddings(config)
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
        if self.first_head is not None:
            x_BTD = self.first_head(x_BTD)
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
        """Returns the logits of all heads, [n, B, T, V]. Head i, at index i - 1, predicts the i-th next token.

        Chained heads read the tokens of `input_ids` that follow a position. Beyond the last token they read token 0
        instead: in the last i - 1 positions, the logits of head i are not those of a longer text.
        """
        config, length = self.config, input_ids.shape[1]
        embedded = self.model.embed_tokens(F.pad(input_ids, (0, config.num_future_tokens - 1)))
        x_BTD = embedded[:, :length]
        rotary, mask = self._positions(x_BTD, 0, attention_mask, None)
        for layer in self.model.layers[: config.num_trunk_layers]:
            x_BTD = layer(x_BTD, rotary, mask, _without_cache)
        outputs, _ = self._run_heads(self._head_order, x_BTD, rotary, mask, lambda _: _without_cache, embedded)
        return torch.stack([self._logits(outputs[index], index) for index in range(config.num_future_tokens)])

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
        decoder = DraftingDecoder(self, self.config.num_future_tokens if num_heads is None else num_heads)
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

    def _unembedding(self, index: int) -> tuple[nn.Module, nn.Module]:
        """Returns the final norm and the projection of the head at `index`, from 0."""
        if index and len(self.extra_unembeddings):
            own: Any = self.extra_unembeddings[index - 1]
            return own.norm, own.lm_head
        return self.model.norm, self.lm_head

    def _logits(self, x: Tensor, index: int = 0) -> Tensor:
        norm, projection = self._unembedding(index)
        return projection(norm(x))

    @property
    def _head_order(self) -> range:
        """The indices of the heads, from 0, in the order in which they run."""
        indices = range(self.config.num_future_tokens)
        return indices[::-1] if self.config.head_kind == "anticausal" else indices

    def _head(self, index: int) -> nn.Module:
        """Returns the module of the head at `index`, from 0."""
        if self.config.head_kind == "anticausal":
            return self.model.layers[-1 - index]
        if index > 0:
            return self.extra_heads[min(index, len(self.extra_heads)) - 1]
        return self.model.layers[-1] if self.first_head is None else self.first_head

    def _next_state(self, index: int, state_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """Returns the state after the head at `index`, whose output before the final norm is given."""
        kind, form = self.config.head_kind, self.config.chain_form
        if kind in ("parallel", "linear") or (kind == "chained" and form == "eagle3" and index == 0):
            return state_BTD
        norm, _ = self._unembedding(index)
        return norm(output_BTD) if kind == "chained" and form == "deepseek" else output_BTD

    def _run_heads(
        self,
        indices: Iterable[int],
        state_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        update_of: Callable[[int], UpdateCache],
        embedded: Tensor | None = None,
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Runs the heads at `indices`, one after another.

        Args:
            update_of: returns the cache update of the head at an index.
            embedded: the embeddings of the tokens of all positions and of the n - 1 after them. Only heads after head 1
                of a chain read them.

        Returns:
            (outputs [B, T, D] before the final norm, by index; the state after the last of these heads).
        """
        outputs = {}
        for index in indices:
            next_BTD = None if embedded is None else embedded[:, index : index + state_BTD.shape[1]]
            outputs[index] = self._head(index)(state_BTD, rotary, mask, update_of(index), next_BTD)
            state_BTD = self._next_state(index, state_BTD, outputs[index])
        return outputs, state_BTD

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


class DraftingDecoder:
    """Decodes one text by drafting and verifying.

    Drafts come from the position that predicted the newest verified token. Heads of a chain run afterwards, one after
    another, because each reads the draft of the one before.

    Attributes:
        cache: keys and values [1, H, S, K] of each layer in use (the trunk first, then the heads by index). They depend
            on verified tokens only.
        states: chained: what each of heads 2 to n will read next at positions that have been cached for the head before
            and not for itself [1, T, D]. Such positions have read drafts.
    """

    def __init__(self, model: MegamtpForCausalLM, num_heads: int):
        if not 1 <= num_heads <= model.config.num_future_tokens:
            raise ValueError(f"num_heads is {num_heads}; expected 1 to {model.config.num_future_tokens}")
        self.model, self.num_heads, self.trunk = model, num_heads, model.model.layers[: model.config.num_trunk_layers]
        self.is_chained, is_anticausal = (model.config.head_kind == kind for kind in ("chained", "anticausal"))
        num_at_once = 1 if self.is_chained else num_heads
        self.indices = [index for index in model._head_order if is_anticausal or index < num_at_once]
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.states: dict[int, Tensor] = {}

    def step(self, ids: list[int], drafts: list[int]) -> tuple[list[int], list[int]]:
        """Verifies the drafts of the previous step in one forward pass.

        Args:
            ids: the text so far.
            drafts: candidates for the tokens after `ids`.

        Returns:
            (verified tokens, new drafts for the tokens after them). There is at least one verified token.
        """
        past = self.cache[0][0].shape[2] if self.cache else 0
        pending = ids[past:] + drafts
        x_BTD = self._embed(pending)
        rotary, mask = self.model._positions(x_BTD, past, None, None)
        for index, layer in enumerate(self.trunk):
            x_BTD = layer(x_BTD, rotary, mask, self._update_of(index))
        outputs, state_BTD = self.model._run_heads(self.indices, x_BTD, rotary, mask, self._update_of_head)
        last = len(pending) - len(drafts) - 1  # position of the last token of `ids`
        greedy = self.model._logits(outputs[0][0, last:]).argmax(-1).tolist()
        num_accepted = 0
        while num_accepted < len(drafts) and drafts[num_accepted] == greedy[num_accepted]:
            num_accepted += 1
        for index in self.cache:
            self._keep(index, len(ids) + num_accepted)
        newest, verified = last + num_accepted, greedy[: num_accepted + 1]
        if self.is_chained:
            return verified, self._draft_in_turn(ids + verified, state_BTD[:, : newest + 1])
        drafting = [self.model._logits(outputs[index][0, newest], index) for index in range(1, self.num_heads)]
        return verified, torch.stack(drafting).argmax(-1).tolist() if drafting else []

    def _draft_in_turn(self, ids: list[int], state_BTD: Tensor) -> list[int]:
        """Returns the drafts of a chain for the tokens after `ids`.

        Args:
            ids: all verified tokens.
            state_BTD: the state after head 1 at the new positions, up to that of the last but one of `ids`.
        """
        drafts: list[int] = []
        kept_before = len(ids) - 1
        for index in range(1, self.num_heads):
            if index in self.states:
                state_BTD = torch.cat((self.states[index], state_BTD), dim=1)
            past = len(ids) - 1 - state_BTD.shape[1]
            next_BTD = self._embed([*ids, *drafts][past + index :])
            rotary, mask = self.model._positions(state_BTD, past, None, None)
            output_BTD = self.model._head(index)(state_BTD, rotary, mask, self._update_of_head(index), next_BTD)
            drafts.append(int(self.model._logits(output_BTD[0, -1], index).argmax()))
            # Position t has read token t + index. Positions that have read a draft will run again.
            kept = max(len(ids) - index, 0)
            self._keep(len(self.trunk) + index, kept)
            self.states[index], kept_before = state_BTD[:, kept - past : kept_before - past], kept
            state_BTD = self.model._next_state(index, state_BTD, output_BTD)
        return drafts

    def _embed(self, ids: list[int]) -> Tensor:
        return self.model.model.embed_tokens(torch.tensor([ids], device=self.model.device))

    def _keep(self, index: int, length: int) -> None:
        """Removes the positions from `length` on from a layer's cache."""
        keys, values = self.cache[index]
        self.cache[index] = keys[:, :, :length], values[:, :, :length]

    def _update_of_head(self, index: int) -> UpdateCache:
        return self._update_of(len(self.trunk) + index)

    def _update_of(self, index: int) -> UpdateCache:
        def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            if index in self.cache:
                past_keys, past_values = self.cache[index]
                keys, values = torch.cat((past_keys, keys), dim=2), torch.cat((past_values, values), dim=2)
            self.cache[index] = keys, values
            return keys, values

        return update


def _without_cache(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys, values


def _update_of(cache: Cache | None, index: int) -> UpdateCache:
    """Returns the cache update of a layer."""
    if cache is None:
        return _without_cache
    return lambda keys, values: cache.update(keys, values, index)

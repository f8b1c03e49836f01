"""Decodes token by token from head 1, with a key/value cache: greedy, or top-k and top-p sampling."""

import torch
from torch import Tensor

from megamtp.errors import InputError
from megamtp.model.attention import KeyValueCache
from megamtp.model.mtp import MTPModel


@torch.inference_mode()
def generate(
    model: MTPModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    end_id: int | None = None,
) -> list[int]:
    """Returns the token ids that follow `prompt_ids`.

    Args:
        prompt_ids: may be empty if `end_id` is given: decoding then starts after `end_id`, as documents do in training.
        max_new_tokens: number of ids to return; fewer if the model predicts `end_id`, which is not returned.
        temperature: divides the logits; 0: greedy decoding.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that together reach this probability. Source: Holtzman et al. 2020,
            arXiv:1904.09751, section 3.1.
        seed: seed of the sampling.
        end_id: id that ends a document.

    Raises:
        InputError: an argument is out of range, or the model's logits are not finite.
    """
    _check_arguments(model, prompt_ids, max_new_tokens, temperature, top_k, top_p, seed, end_id)
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    next_inputs = prompt_ids if end_id is None else prompt_ids or [end_id]
    caches: list[KeyValueCache] | None = None
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens:
        logits_BV, caches = model.next_token_logits(torch.tensor([next_inputs], device=device), caches)
        logits_V = logits_BV[0].float().cpu()
        if not torch.isfinite(logits_V).all():
            raise InputError(
                f"the model's logits after {len(prompt_ids) + len(new_ids)} tokens are not finite; expected finite "
                "logits; use another checkpoint"
            )
        token = _sample(logits_V, temperature, top_k, top_p, generator)
        if token == end_id:
            break
        new_ids.append(token)
        next_inputs = [token]
    return new_ids


def _sample(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V, tokens_V = ((logits_V - logits_V.max()).double() / temperature).sort(descending=True, stable=True)
    probabilities_V = logits_V[:top_k].softmax(dim=0)
    if top_p is not None:
        probability_of_likelier_V = probabilities_V.cumsum(dim=0) - probabilities_V
        probabilities_V = probabilities_V * (probability_of_likelier_V < top_p)
    return int(tokens_V[torch.multinomial(probabilities_V, 1, generator=generator)])


def _check_arguments(
    model: MTPModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    end_id: int | None,
) -> None:
    vocab_size = model.config.vocab_size
    if max_new_tokens < 0:
        raise InputError(f"{max_new_tokens} new tokens; expected 0 or more")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature {temperature}; expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top-k {top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top-p {top_p}; expected more than 0, at most 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed {seed}; expected 0 or more, below 2**63")
    if not prompt_ids and end_id is None:
        raise InputError("the prompt is empty and the tokenizer has no end-of-document id; expected a prompt")
    if not all(0 <= token < vocab_size for token in prompt_ids):
        raise InputError(
            f"the prompt has token ids outside the model's vocabulary of {vocab_size}; expected ids of the model's own "
            "tokenizer"
        )

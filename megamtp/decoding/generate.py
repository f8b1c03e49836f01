"""Token by token from head 1, with a key/value cache: greedy, or sampled among the likeliest tokens."""

import torch
from torch import Tensor

from megamtp.errors import InputError
from megamtp.model.layers import KeyValueCache
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
    """The ids that follow `prompt_ids`: `max_new_tokens` of them, or fewer if `end_id` comes (it is not returned).

    Args:
        prompt_ids: may be empty if there is an `end_id`: a text begins where another ended.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: samples among the k likeliest tokens.
        top_p: samples among the likeliest tokens that together reach this probability. Source: Holtzman et al. 2020,
            arXiv:1904.09751, section 3.1.

    Raises:
        InputError: a number out of its range, or the model computes infinities.
    """
    _check(model, prompt_ids, max_new_tokens, temperature, top_k, top_p, seed, end_id)
    assert model.embedding is not None  # which a whole model has
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    pending = prompt_ids if end_id is None else prompt_ids or [end_id]
    caches: list[KeyValueCache] | None = None
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens:
        logits_BV, caches = model.next_token_logits(torch.tensor([pending], device=device), caches)
        logits_V = logits_BV[0].float().cpu()
        if not torch.isfinite(logits_V).all():
            raise InputError(
                f"the model's logits after {len(prompt_ids) + len(new_ids)} tokens are not finite; expected other "
                "weights"
            )
        token = _choose(logits_V, temperature, top_k, top_p, generator)
        if token == end_id:
            break
        new_ids.append(token)
        pending = [token]
    return new_ids


def _choose(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V, tokens_V = ((logits_V - logits_V.max()).double() / temperature).sort(descending=True, stable=True)
    probabilities_V = logits_V[:top_k].softmax(dim=0)
    if top_p is not None:
        before_V = probabilities_V.cumsum(dim=0) - probabilities_V
        probabilities_V = probabilities_V * (before_V < top_p)
    return int(tokens_V[torch.multinomial(probabilities_V, 1, generator=generator)])


def _check(
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
        raise InputError("an empty prompt, and no end-of-document id to begin from; expected a prompt")
    if not all(0 <= token < vocab_size for token in prompt_ids):
        raise InputError(
            f"the prompt holds token ids outside the model's {vocab_size}; expected the model's own tokenizer"
        )

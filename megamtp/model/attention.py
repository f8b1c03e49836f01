"""Causal self-attention with rotary positions, within documents or over the whole window.

Tests: tests/unit/model/test_layers.py, tests/distributed/test_documents.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megamtp.model.rotary import rotate

KeyValueCache = tuple[Tensor, Tensor]


class DocumentMask(NamedTuple):
    """Keeps attention inside the documents of a micro-batch, and counts positions from each document's start.

    documents.py makes it.

    Attributes:
        attention: bool [B, 1, T, T], true where a query attends to a key (last dimension); or a BlockMask for
            FlexAttention.
        rotary: (cos, sin) [B, 1, T, K] of each position within its document.
    """

    attention: Tensor | BlockMask
    rotary: tuple[Tensor, Tensor]


def attention(
    queries_BTD: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: tuple[Tensor, Tensor],
    head_dim: int,
    cache: KeyValueCache | None = None,
    mask: Tensor | BlockMask | None = None,
) -> tuple[Tensor, KeyValueCache]:
    """Computes causal self-attention, grouped-query if `keys` and `values` have fewer heads than the queries.

    Args:
        keys, values: [B, T, H_kv K].
        rotary: (cos, sin) [T, K] of the new positions, or [B, 1, T, K].
        cache: keys and values [B, H_kv, past, K] of earlier positions.
        mask: see DocumentMask.attention; None: a position attends to itself and all earlier positions.

    Returns:
        (attended values [B, T, D], keys and values [B, H_kv, past + T, K] of earlier and new positions).
    """
    batch, length, _ = queries_BTD.shape
    queries, keys, values = (x.view(batch, length, -1, head_dim).transpose(1, 2) for x in (queries_BTD, keys, values))
    queries, keys = rotate(queries, *rotary), rotate(keys, *rotary)
    past = 0
    if cache is not None:
        past = cache[0].shape[2]
        keys, values = torch.cat((cache[0], keys), dim=2), torch.cat((cache[1], values), dim=2)
    grouped = keys.shape[1] != queries.shape[1]
    if isinstance(mask, BlockMask):
        attended = flex_attention(queries, keys, values, block_mask=mask, enable_gqa=grouped)
    else:
        masking = _causal_masking(length, past, keys.device) if mask is None else {"attn_mask": mask}
        attended = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=grouped, **masking)
    return attended.transpose(1, 2).reshape(batch, length, -1), (keys, values)


def _causal_masking(length: int, past: int, device: torch.device) -> dict:
    if past == 0:
        return {"is_causal": True}  # torch selects flash kernels by this flag, not by a causal mask
    return {"attn_mask": torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)}

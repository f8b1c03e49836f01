"""Several documents in one window, each as if it were alone: attention stays inside them, and positions start at 0
in each.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from megamtp.config import ModelConfig
from megamtp.model.layers import Separation, rotary_tables


@torch.no_grad()
def separate(documents_BT: Tensor, model: ModelConfig, dtype: torch.dtype, in_blocks: bool) -> Separation:
    """What layers must be told of a micro-batch's documents.

    Args:
        documents_BT: int64, rising in each row; positions of equal numbers are one document.
        dtype: of the layers' inputs.
        in_blocks: make a mask for FlexAttention, which skips blocks that no query sees but must be compiled to be of
            use.
    """
    batch, length = documents_BT.shape
    places_T = torch.arange(length, device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    positions_BT = places_T - places_T.where(begins_BT, 0).cummax(dim=1).values
    cos_TK, sin_TK = rotary_tables(length, model.head_dim, model.rope_theta, documents_BT.device, dtype)
    rotary = cos_TK[positions_BT][:, None], sin_TK[positions_BT][:, None]

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_BT[row, query] == documents_BT[row, key])

    if in_blocks:
        return Separation(create_block_mask(seen, batch, None, length, length, device=documents_BT.device), rotary)
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return Separation((same_BTT & (places_T[:, None] >= places_T))[:, None], rotary)

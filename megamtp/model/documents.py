"""Several documents in one window: attention stays inside each document, and positions start at 0 in each."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from megamtp.config import ModelConfig
from megamtp.model.attention import DocumentMask
from megamtp.model.rotary import rotary_tables


@torch.no_grad()
def make_document_mask(
    documents_BT: Tensor, model: ModelConfig, dtype: torch.dtype, use_block_mask: bool
) -> DocumentMask:
    """Returns the attention mask and the rotary tables for a micro-batch's documents.

    Args:
        documents_BT: int64 document numbers, which do not decrease along a row.
        dtype: of the layers' inputs.
        use_block_mask: make a BlockMask for FlexAttention, which skips blocks that are masked out entirely but is fast
            only if compiled.
    """
    batch, length = documents_BT.shape
    positions_T = torch.arange(length, device=documents_BT.device)
    starts_document_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_document_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    document_start_BT = positions_T.where(starts_document_BT, 0).cummax(dim=1).values
    cos_TK, sin_TK = rotary_tables(length, model.head_dim, model.rope_theta, documents_BT.device, dtype)
    positions_in_document_BT = positions_T - document_start_BT
    rotary = cos_TK[positions_in_document_BT][:, None], sin_TK[positions_in_document_BT][:, None]

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_BT[row, query] == documents_BT[row, key])

    if use_block_mask:
        return DocumentMask(create_block_mask(attends, batch, None, length, length, device=documents_BT.device), rotary)
    same_document_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    causal_TT = positions_T[:, None] >= positions_T
    return DocumentMask((same_document_BTT & causal_TT)[:, None], rotary)

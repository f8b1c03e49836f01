"""Collectives of torch.distributed under their new names, for torch 2.13 (which renames them) and earlier."""

import torch.distributed as dist

_HAS_NEW_NAMES = hasattr(dist, "all_gather_single")
all_gather_single = dist.all_gather_single if _HAS_NEW_NAMES else dist.all_gather_into_tensor
reduce_scatter_single = dist.reduce_scatter_single if _HAS_NEW_NAMES else dist.reduce_scatter_tensor

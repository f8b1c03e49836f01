"""Collectives of torch.distributed by the names that torch 2.13 gives them. Earlier versions have the older names
alone.
"""

import torch.distributed as dist

_RENAMED = hasattr(dist, "all_gather_single")
all_gather_single = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
reduce_scatter_single = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor

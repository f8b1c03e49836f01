"""Tests of collectives under names that work with every supported torch, between two ranks."""

import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _gather_and_reduce() -> tuple[list[float], list[float]]:
    """Returns what this rank gathers from both ranks, and its shard of their sum."""
    from megamtp.cluster.collectives import all_gather_single, reduce_scatter_single

    rank = dist.get_rank()
    gathered, summed = torch.empty(4), torch.empty(2)
    all_gather_single(gathered, torch.tensor([1.0, 2.0]) + 10 * rank)
    reduce_scatter_single(summed, torch.tensor([1.0, 2.0, 3.0, 4.0]) * (1 + 9 * rank))
    return gathered.tolist(), summed.tolist()


def test_shards_are_gathered_and_reduced_in_the_order_of_ranks():
    gathered = [1.0, 2.0, 11.0, 12.0]
    assert run_ranks(_gather_and_reduce, 2) == [(gathered, [11.0, 22.0]), (gathered, [33.0, 44.0])]

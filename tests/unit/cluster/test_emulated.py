"""Tests of the emulated cluster: the transfers of one step of one rank."""

import pytest

from megamtp.cluster.environment import Place, place_in_cluster
from tests.cases import global_batch, own_share, small_config
from tests.ranks import run_ranks


def _transfers_of_a_step(world_size: int, **settings) -> list[tuple[str, int, float]]:
    from megamtp.cluster import emulated
    from megamtp.engines.deepspeed.join import join_peers
    from megamtp.engines.zero import ZeroEngine

    common = {"engine__kind": "zero3", "cluster__emulate": world_size, "cluster__flat_bandwidth": 1e9}
    common |= {"cluster__latency": 0, "model__num_future_tokens": 2, "train__precision": "bf16"}
    config = small_config(world_size, **common | settings)
    logs = []
    join = emulated.join
    emulated.join = lambda cluster: logs.append(join(cluster))
    join_peers(place_in_cluster(Place(0, 0, 1), config.cluster), config.cluster)
    engine = ZeroEngine(config)
    for step in range(3):
        logs[0].clear()
        engine.train_batch(own_share(global_batch(config, step, 1), 0, 1), [40, 40], lr=1e-3)
    return [(transfer.kind, transfer.num_bytes, transfer.seconds) for transfer in logs[0]]


def _transfers_in_float8(world_size: int) -> list[tuple[str, int, float]]:
    lengths = {
        "train__sequence_length": 16,
        "train__micro_batch_size": 1,
        "train__global_batch_tokens": 16 * world_size,
    }
    sizes = {"model__mlp_dim": 32, "model__vocab_size": 112}
    return _transfers_of_a_step(world_size, train__precision="fp8", **lengths, **sizes)


@pytest.mark.parametrize("world_size", [2, 6])
def test_bytes_of_a_step_in_float8(world_size):
    """Matrices of layers have one byte per element. With 6 ranks, a shard has an odd number of bytes."""
    (transfers,) = run_ranks(_transfers_in_float8, 1, world_size, backend="none")

    def padded(*sizes: int) -> int:
        return sum(-(-size // world_size) * world_size for size in sizes)

    layer = padded(*[256] * 4, *[32 * 16] * 3) + 2 * padded(16, 16)
    embedding, unembedding = 2 * padded(112 * 16), 2 * padded(16, 112 * 16)
    gathers = [num_bytes for kind, num_bytes, _ in transfers if kind == "all_gather"]
    assert sorted(gathers) == sorted([embedding, unembedding, *[layer] * (3 + 2 + 3)])
    # The scales of all layers' four groups, in one reduction.
    assert next(num_bytes for kind, num_bytes, _ in transfers if kind == "all_reduce") == 4 * 5 * 4


@pytest.mark.parametrize("world_size", [2, 64])
def test_bytes_counts_and_times_of_a_step(world_size):
    """3 trunk layers, 2 heads, embedding and unembedding in bf16. Each parameter is padded to shards of equal size."""
    (transfers,) = run_ranks(_transfers_of_a_step, 1, world_size, backend="none")

    def padded(*sizes: int) -> int:
        return 2 * sum(-(-size // world_size) * world_size for size in sizes)

    layer = padded(16, 16, *[256] * 4, *[24 * 16] * 3)
    embedding, unembedding = padded(97 * 16), padded(16, 97 * 16)
    gathers = [num_bytes for kind, num_bytes, _ in transfers if kind == "all_gather"]
    reductions = [num_bytes for kind, num_bytes, _ in transfers if kind == "reduce_scatter"]
    # Forward gathers everything once. Backward gathers the trunk again: the weights of heads and unembedding are kept,
    # and the embedding is not needed.
    assert sorted(gathers) == sorted([embedding, unembedding, *[layer] * (3 + 2 + 3)])
    assert sorted(reductions) == sorted([embedding, unembedding, *[layer] * (3 + 2)])
    for kind, num_bytes, seconds in transfers:
        if kind in ("all_gather", "reduce_scatter"):
            assert seconds == pytest.approx(num_bytes * (world_size - 1) / world_size / 1e9)

"""Compares grouped communication on a GPU (streams, reused memory, compiled layers) with plain autograd.

On the emulated cluster every weight consists of W copies of this rank's shard, and every reduction sums W pieces of
this rank's gradient. Both can be computed without an engine, so a race or a stale weight shows as a wrong gradient.
"""

import pytest
import torch

from megamtp.cluster.emulated import hold, mark
from megamtp.cluster.environment import Place, place_in_cluster
from megamtp.engines.deepspeed.join import join_peers
from tests.cases import small_config
from tests.ranks import run_gpu_rank
from tests.reference import relative_error

pytestmark = pytest.mark.gpu

WORLD_SIZE, STEPS = 4, 12


# (activation checkpointing, modules to prefetch, micro-batches per step, CUDA graphs)
CASES = [(False, 2, 1, False), (True, 2, 2, False), (False, 0, 1, False), (False, 5, 3, False)]
CASES += [(False, 2, 1, True), (False, 2, 3, True)]


def _gradient_errors() -> dict[tuple[bool, int, int, bool], list[float]]:
    """Returns for each case the largest relative error of any gradient shard in each of STEPS steps."""
    from torch._dynamo.utils import counters

    from megamtp.data.loader import Batch
    from megamtp.engines.zero import ZeroEngine
    from megamtp.model.mtp import MTPModel

    errors_of_cases = {}
    for case in CASES:
        checkpointing, prefetch, accumulation, cuda_graphs = case
        config = small_config(
            WORLD_SIZE,
            model__dim=256,
            model__mlp_dim=512,
            model__num_layers=9,
            model__num_future_tokens=3,
            model__vocab_size=4096,
            model__num_attention_heads=4,
            train__sequence_length=512,
            train__global_batch_tokens=2 * 512 * WORLD_SIZE * accumulation,
            train__activation_checkpointing=checkpointing,
            train__cuda_graphs=cuda_graphs,
            engine__prefetch_modules=prefetch,
            cluster__emulate=WORLD_SIZE,
            cluster__flat_bandwidth=20e9,
            head_loss__chunk_rows=256,
        )
        if not errors_of_cases:
            join_peers(place_in_cluster(Place(0, 0, 1), config.cluster), config.cluster)
        engine = ZeroEngine(config)
        plain = MTPModel(config.model, config.head_loss, schedule="deferred").cuda()
        with torch.no_grad():
            for parameter, sharded in zip(plain.parameters(), engine.model.parameters(), strict=True):
                parameter.copy_(sharded.ds_tensor.repeat(WORLD_SIZE)[: parameter.numel()].view_as(parameter))
        errors = errors_of_cases[case] = []
        for step in range(STEPS):
            plain.zero_grad()
            batches = []
            for index in range(accumulation):
                generator = torch.Generator().manual_seed(step * accumulation + index)
                tokens = torch.randint(4096, (2, 512 + 3), generator=generator).cuda()
                batches.append(Batch.from_tokens(tokens, 512))
                plain(batches[-1].inputs, batches[-1].targets, [1 / 1024 / accumulation] * 3)[0].backward()
            engine.train_batch(batches, [1024 * accumulation] * 3, lr=0.0)
            sums = engine.deepspeed_engine.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            errors.append(
                max(
                    relative_error(sums[sharded.ds_id], parameter.grad.view(WORLD_SIZE, -1).sum(0).double())
                    for parameter, sharded in zip(plain.parameters(), engine.model.parameters(), strict=True)
                )
            )
            if cuda_graphs:
                assert engine.evaluate(iter(batches)).isfinite().all()  # has graphs of its own
        # One for all layers of all engines; with CUDA graphs also one for training and one for evaluation.
        assert counters["stats"]["unique_graphs"] == (3 if cuda_graphs else 1)
        assert sum(counters["graph_break"].values()) == 0
    return errors_of_cases


def test_gradients_equal_those_of_plain_autograd():
    """In fp32 without TF32, only the order of sums over 1024 positions differs."""
    errors_of_cases = run_gpu_rank(_gradient_errors, backend="none")
    assert list(errors_of_cases) == CASES
    for case, errors in errors_of_cases.items():
        assert len(errors) == STEPS
        assert max(errors) < 1e-5, case


def _milliseconds_held() -> float:
    """Returns the duration of 40 holds of 2 ms."""
    time = torch.empty(1, dtype=torch.int64, device="cuda")
    hold(mark(time), 1e-3, 1)
    hold(mark(time), 1e-3, 16)
    torch.cuda._sleep(100)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for num_sms in (1, 16):
        for _ in range(20):
            mark(time)
            torch.cuda._sleep(100_000)  # the transfer itself, which is part of the held time
            hold(time, 2e-3, num_sms)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def test_stream_is_held_for_the_requested_time():
    assert _milliseconds_held() == pytest.approx(40 * 2.0, rel=0.02)

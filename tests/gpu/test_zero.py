"""The ZeRO engines on a GPU: gradients in every precision, fp16's loss scale, and memory with several heads.

Run with: bash launch/test.sh tests/gpu
"""

import itertools

import pytest
import torch

from tests.cases import small_config
from tests.engine_steps import largest_errors
from tests.ranks import run_gpu_rank

pytestmark = pytest.mark.gpu

# Bounds of (gradient errors, loss errors). fp32: TF32 is off, so roundings are 2^-24 as on a CPU. bf16: see
# test_gradients.py. fp16 has three more bits than bf16, so an eighth of its error; a gradient below fp16's range would
# give an error of the order of 1.
BOUNDS = {"fp32": (1e-5, 1e-5), "bf16": (0.04, 2e-3), "fp16": (0.005, 2.5e-4)}


CASES = list(itertools.product(("zero1", "zero3"), BOUNDS, ("sequential", "deferred"), (1, 4), (False,)))
CASES += itertools.product(("zero1", "zero3"), BOUNDS, ("sequential",), (4,), (True,))  # offloaded


def _errors() -> dict[tuple, tuple[float, float]]:
    from megamtp.engines.zero import ZeroEngine

    errors = {}
    for case in CASES:
        kind, precision, schedule, n, offloaded = case
        config = small_config(
            world_size=1,
            accumulation=2,
            engine__kind=kind,
            train__precision=precision,
            engine__head_schedule=schedule,
            model__num_future_tokens=n,
            model__mlp_dim=32,
            model__vocab_size=104,
            train__activation_checkpointing=True,
            engine__offload_optimizer=offloaded,
            engine__offload_parameters=offloaded and kind == "zero3",
        )
        errors[case] = largest_errors(config, ZeroEngine(config), num_steps=3)
    return errors


@pytest.fixture(scope="module")
def errors_of_all() -> dict[tuple, tuple[float, float]]:
    return run_gpu_rank(_errors)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gradients_equal_the_reference(case, errors_of_all):
    gradient_error, loss_error = errors_of_all[case]
    gradient_bound, loss_bound = BOUNDS[case[1]]
    assert gradient_error < gradient_bound
    assert loss_error < loss_bound


def _peak_bytes() -> dict[tuple[str, int], int]:
    """Returns the peak memory of a step above the memory allocated before it, by (engine kind, number of heads)."""
    from megamtp.data.loader import Batch
    from megamtp.engines.zero import ZeroEngine

    vocabulary, positions, peaks = 32000, 2048, {}
    for kind, n in itertools.product(("zero1", "zero3"), (1, 4)):
        config = small_config(
            world_size=1,
            engine__kind=kind,
            model__num_future_tokens=n,
            model__dim=256,
            model__mlp_dim=512,
            model__num_layers=8,
            model__vocab_size=vocabulary,
            head_loss__chunk_rows=512,
            train__precision="bf16",
            train__sequence_length=positions,
            train__micro_batch_size=4,
            train__global_batch_tokens=4 * positions,
        )
        engine = ZeroEngine(config)
        tokens = torch.randint(vocabulary, (4, positions + n))
        batch = Batch.from_tokens(tokens, positions)
        for _ in range(2):
            engine.train_batch([batch], [4 * positions] * n, lr=1e-3)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.train_batch([batch], [4 * positions] * n, lr=1e-3)
        peaks[kind, n] = torch.cuda.max_memory_allocated() - before
    return peaks


def test_three_more_heads_need_less_memory_than_one_heads_logits():
    """All logits of one head in bf16 have 4 x 2048 x 32000 x 2 bytes = 500 MiB.

    The gradients of three heads and dz have about 40 MiB.
    """
    peaks = run_gpu_rank(_peak_bytes)
    for kind in ("zero1", "zero3"):
        assert peaks[kind, 4] - peaks[kind, 1] < 64 * 2**20
        assert peaks[kind, 1] > 512 * 32000 * 2  # the measurement includes a chunk of logits


def _steps_with_overflow() -> tuple[list[bool], list[float], bool]:
    """Trains in fp16 with an initial loss scale that overflows.

    Returns:
        (skipped and loss scale of each step, whether only steps that were not skipped changed the weights).
    """
    from megamtp.engines.base import count_targets
    from megamtp.engines.zero import ZeroEngine
    from tests.cases import global_batch

    config = small_config(world_size=1, train__precision="fp16", engine__deepspeed__fp16__initial_scale_power=40)
    engine = ZeroEngine(config)
    batches = global_batch(config, 0, 2)[:1]
    counts = count_targets(batches, True, 1, engine.device)
    start = {name: parameter.ds_tensor.clone() for name, parameter in engine.model.named_parameters()}
    skipped, scales, unchanged = [], [], True
    for _ in range(40):
        result = engine.train_batch(batches, counts, lr=1e-2)
        skipped.append(result.skipped)
        scales.append(float(engine.deepspeed_engine.optimizer.loss_scale))
        if all(skipped):
            unchanged &= all(
                torch.equal(start[name], parameter.ds_tensor) for name, parameter in engine.model.named_parameters()
            )
    moved = any(
        not torch.equal(start[name], parameter.ds_tensor) for name, parameter in engine.model.named_parameters()
    )
    return skipped, scales, unchanged and moved


def test_fp16_overflow_skips_the_step_and_lowers_the_scale():
    skipped, scales, only_applied_steps_changed_weights = run_gpu_rank(_steps_with_overflow)
    assert skipped[0] and not skipped[-1]
    assert scales[-1] < 2.0**40
    assert all(after <= before for before, after in itertools.pairwise(scales))
    assert only_applied_steps_changed_weights

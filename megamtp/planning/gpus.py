"""The GPUs that plans know, and their rates.

Tests: tests/unit/planning/test_planner.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU as measured in bf16.

    Attributes:
        memory_bytes: bytes that one process can allocate.
        matrix_flops: FLOP/s of large matrix products.
        attention_flops: FLOP/s of attention; causal products count half.
        memory_bandwidth: bytes/s.
        float8_speedup: FLOP/s of the loss's fp8 products divided by the FLOP/s of the same products in bf16.
    """

    memory_bytes: float
    matrix_flops: float
    attention_flops: float
    memory_bandwidth: float
    multiprocessors: int
    float8_speedup: float


# Rates and bytes are fitted to the "plain" steps of tools/results/overhead*.json on both GPUs (2026-11-28 and -29). The
# GPUs have the same FLOP/s and differ in memory bandwidth.
GPUS = {"h100": Gpu(79e9, 712e12, 246e12, 2.8e12, 132, 1.8), "h200": Gpu(140e9, 712e12, 246e12, 4.0e12, 132, 1.8)}
# Bytes that a layer's norms, rotation, activation and sums read and write per element of the residual stream, forward
# and backward.
ELEMENT_BYTES = 102

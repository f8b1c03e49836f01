"""The GPUs that plans know, their rates, and those of layers in each precision."""

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


@dataclass(frozen=True)
class LayerRates:
    """How fast layers are whose products are in one precision.

    Attributes:
        product_speedup: FLOP/s of the products divided by the FLOP/s of the same products in bf16.
        element_bytes: bytes that norms, rotation, activation, sums and quantisation read and write per element of the
            residual stream, forward and backward.
        weight_bytes: bytes that are read and written per element of a weight outside of products, once a micro-batch.
        host_seconds: time that the CPU needs to launch one pass of a layer, forward or backward.
        backward_bytes: bytes that a layer's backward pass allocates and frees again, per hidden element of the MLP.
    """

    product_speedup: float
    element_bytes: float
    weight_bytes: float
    host_seconds: float
    backward_bytes: int


# By train.precision. bf16 is fitted as GPUS are. Its host_seconds are a guess, because no measured step waited for the
# CPU; together with HOOK_SECONDS they are below 2 ms, the mean time of the GPU for a pass of a 0.3B layer.
# fp8: products of single layers run at 1431 TFLOP/s on an H200 (2026-11-30). tools/benchmarks/layer.py counts 160 bytes
# per element and 2 per weight; the larger numbers are fitted to tools/results/overhead_fp8*.json. The CPU needed 34 ms
# to launch a step of the 0.3B model's 18 layers, and 58 ms with ZeRO-3: 0.95 and 1.6 ms a pass. backward_bytes are
# fitted to the same files' peak memory.
LAYER_RATES = {"bf16": LayerRates(1.0, 102, 0, 0.7e-3, 13), "fp8": LayerRates(1431 / 712, 192, 2.3, 0.95e-3, 9)}
# Time that the CPU needs for a layer's or a head's communication in one pass under ZeRO-3, and for one head's loss.
HOOK_SECONDS, LOSS_HOST_SECONDS = 0.65e-3, 0.5e-3


def find_gpu(device_name: str) -> Gpu | None:
    """Returns the GPU that torch calls `device_name`; None for others, also for PCIe cards and MIG slices."""
    words = device_name.lower().split()
    if {"pcie", "nvl", "mig"} & set(words):
        return None
    return next((gpu for name, gpu in GPUS.items() if name in words), None)

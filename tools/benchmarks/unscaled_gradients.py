"""Runs megamtp.pretrain with a planted fault: gradients in e4m3 without a scale, instead of e5m2 with one.

    python -m benchmarks.unscaled_gradients STEP configs/0.3b_n4.yaml train.precision=fp8 ...

`learning` runs it to show that its comparison can fail. The training ends after its first evaluation at STEP or later.
Learning rates follow train.steps, so that the training is comparable with others of the same train.steps.

The gradients of SwiGLU and of the losses come out of kernels in e5m2. They are restored from it and then cast.
"""

import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

# First: see megamtp/pretrain.py.
from megamtp import pretrain

# isort: split
import torch
from torch import Tensor

from megamtp.losses.float8 import Float8Products
from megamtp.precision import float8, operations
from megamtp.precision.operations import E4M3, E5M2, LARGEST
from megamtp.training.metrics import Metrics

FIRST_ARGUMENT = 1  # of sys.argv, behind the module


@contextmanager
def planted() -> Iterator[None]:
    """Within the block, layers and losses cast their gradients to e4m3 without a scale."""
    with (
        patch.object(float8, "quantise_with_transpose", quantise_with_transpose),
        patch.object(float8, "swiglu_backward", swiglu_backward),
        patch.object(Float8Products, "hidden_gradient", _hidden_gradient),
    ):
        yield


@contextmanager
def ending_at(step: int) -> Iterator[None]:
    """Within the block, a training asks itself to stop after its first evaluation at `step` or later."""
    report = Metrics.report_evaluation

    def report_and_stop(metrics: Metrics, evaluated_step: int, losses: list[float]) -> None:
        report(metrics, evaluated_step, losses)
        if step <= evaluated_step < metrics.config.train.steps:
            signal.raise_signal(signal.SIGTERM)

    with patch.object(Metrics, "report_evaluation", report_and_stop):
        yield


def quantise_with_transpose(pieces: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces operations.quantise_with_transpose. Activations, in e4m3, are quantised as before."""
    if dtype != E5M2:
        return operations.quantise_with_transpose(pieces, dtype)
    cast_MN, one = _cast(torch.cat(list(pieces), 1))
    return cast_MN, cast_MN.T.contiguous(), one


def swiglu_backward(d_hidden_MN: Tensor, gate_MN: Tensor, up_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces operations.swiglu_backward."""
    quantised_M2N, _, scale = operations.swiglu_backward(d_hidden_MN, gate_MN, up_MN)
    cast_M2N, one = _cast(quantised_M2N.float() * scale)
    return cast_M2N, cast_M2N.T.contiguous(), one


_scaled_hidden_gradient = Float8Products.hidden_gradient


def _hidden_gradient(products: Float8Products, gradient_CV: Tensor, out: Tensor) -> None:
    """Replaces Float8Products.hidden_gradient."""
    cast_CV, one = _cast(gradient_CV.float() * products.gradient_scale)
    _scaled_hidden_gradient(dataclasses.replace(products, gradient_scale=one), cast_CV, out)


def _cast(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (the gradient in e4m3, its scale, which is 1)."""
    one = torch.ones(1, 1, dtype=torch.float32, device=gradient.device)
    return gradient.clamp(-LARGEST[E4M3], LARGEST[E4M3]).to(E4M3), one


if __name__ == "__main__":
    last_step = int(sys.argv.pop(FIRST_ARGUMENT))
    with planted(), ending_at(last_step):
        pretrain.entry()

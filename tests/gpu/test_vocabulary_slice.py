"""A loss spread over slices of the unembedding on a GPU, whose kernels a CPU does not run: values and gradients
against float64.
"""

import pytest
import torch
import torch.nn.functional as F

from megamtp.losses.vocabulary_slice import combine, slice_gradients, slice_statistics
from megamtp.targets import IGNORED
from tests.gpu.test_linear_cross_entropy import inputs

pytestmark = pytest.mark.gpu

CUT = [1500, 6001, 499]


# As for the whole loss, and each slice's part of dH is rounded to the model's dtype.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-3), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_float64(dtype, bound, z_loss):
    hidden, weight, targets = inputs(dtype)
    logits = hidden.double() @ weight.double().T
    expected_nll = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    z = (logits.logsumexp(-1).square() * (targets != IGNORED)).sum()
    expected_gradients = torch.autograd.grad(0.01 * (expected_nll + z_loss * z), (hidden, weight))
    hidden, weight = hidden.detach(), weight.detach()
    firsts, slices = [0, CUT[0], CUT[0] + CUT[1]], weight.split(CUT)
    begun = [slice_statistics(hidden, rows, targets, first) for rows, first in zip(slices, firsts, strict=True)]
    nll, log_partition = combine(torch.stack([statistics for _, statistics in begun]), targets)
    sums = [torch.zeros_like(rows, dtype=torch.float32) for rows in slices]
    d_hidden = sum(
        slice_gradients(logits_NR, hidden, rows, targets, first, log_partition, total, 0.01, z_loss).double()
        for (logits_NR, _), rows, first, total in zip(begun, slices, firsts, sums, strict=True)
    )
    assert abs(nll.sum().item() / expected_nll.item() - 1) < (1e-5 if dtype == torch.float32 else 1e-3)
    for found, wanted in zip((d_hidden, torch.cat(sums)), expected_gradients, strict=True):
        assert ((found.double() - wanted.double()).norm() / wanted.double().norm()).item() < bound

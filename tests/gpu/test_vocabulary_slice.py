"""A loss spread by vocabulary on a GPU, with its Triton kernels: values and gradients against float64."""

import pytest
import torch
import torch.nn.functional as F

from megamtp.losses.vocabulary_slice import combine_statistics, slice_gradients, slice_statistics
from megamtp.targets import IGNORED
from tests.gpu.test_linear_cross_entropy import inputs
from tests.reference import relative_error

pytestmark = pytest.mark.gpu

CUT = [1500, 6001, 499]


# As for the whole loss; in addition, each slice's share of dH is rounded to the model's dtype.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-3), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_float64(dtype, bound, z_loss):
    hidden, weight, targets = inputs(dtype)
    logits = hidden.double() @ weight.double().T
    expected_nll = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    z = (logits.logsumexp(-1).square() * (targets != IGNORED)).sum()
    expected_gradients = torch.autograd.grad(0.01 * (expected_nll + z_loss * z), (hidden, weight))
    hidden, weight = hidden.detach(), weight.detach()
    slices = list(zip(weight.split(CUT), [0, CUT[0], CUT[0] + CUT[1]], strict=True))
    logits, statistics = zip(*(slice_statistics(hidden, rows, targets, first) for rows, first in slices), strict=True)
    nll, log_partition = combine_statistics(torch.stack(statistics), targets)
    d_weight = [torch.zeros_like(rows, dtype=torch.float32) for rows, _ in slices]
    d_hidden = sum(
        slice_gradients(logits_NR, hidden, rows, targets, first, log_partition, d_rows, 0.01, z_loss).double()
        for logits_NR, (rows, first), d_rows in zip(logits, slices, d_weight, strict=True)
    )
    assert abs(nll.sum().item() / expected_nll.item() - 1) < (1e-5 if dtype == torch.float32 else 1e-3)
    for gradient, expected in zip((d_hidden, torch.cat(d_weight)), expected_gradients, strict=True):
        assert relative_error(gradient, expected.double()) < bound

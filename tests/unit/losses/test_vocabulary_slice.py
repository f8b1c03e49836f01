"""Losses spread by vocabulary, all slices in one process: equal to the whole loss, however the rows are cut."""

import pytest
import torch

from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.losses.vocabulary_slice import combine, slice_gradients, slice_statistics
from megamtp.targets import IGNORED

POSITIONS, WIDTH, VOCABULARY = 23, 8, 40
CUTS = {"whole": [40], "even": [20, 20], "uneven": [1, 30, 7, 2]}


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states, weight, targets): some targets ignored, one the first row, one the last."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    targets[::5], targets[1], targets[2] = IGNORED, 0, VOCABULARY - 1
    return hidden, weight, targets


def spread(hidden, weight, targets, cut, **options):
    """(nll sum, log-partitions, dH, dW) from the slices; dW of two equal uses."""
    slices = list(zip(weight.split(cut), torch.tensor([0, *cut]).cumsum(0).tolist(), strict=False))
    begun = [slice_statistics(hidden, rows, targets, first) for rows, first in slices]
    nll, log_partition = combine(torch.stack([statistics for _, statistics in begun]), targets)
    sums = [torch.zeros(rows.shape, dtype=nll.dtype) for rows, _ in slices]
    for again in range(2):
        logits = [found for found, _ in begun] if again else [found.clone() for found, _ in begun]
        parts = [
            slice_gradients(found, hidden, rows, targets, first, log_partition, total, **options)
            for found, (rows, first), total in zip(logits, slices, sums, strict=True)
        ]
    return nll.sum(), log_partition, torch.stack(parts).sum(0), torch.cat(sums)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_slices_together_are_the_whole_loss(cut, dtype, bound):
    hidden, weight, targets = case(dtype)
    nll_sum, log_partition, d_hidden, d_weight = spread(hidden, weight, targets, CUTS[cut], factor=0.25, z_loss=0.1)
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss, exact_nll_sum = linear_cross_entropy(exact_hidden, exact_weight, targets, scale=0.25, z_loss=0.1)
    loss.backward()
    assert nll_sum.item() == pytest.approx(exact_nll_sum.item(), rel=bound)
    assert torch.allclose(log_partition.double(), (hidden.double() @ weight.double().T).logsumexp(1), rtol=bound)
    for found, exact in ((d_hidden, exact_hidden.grad), (d_weight / 2, exact_weight.grad)):
        assert (found.double() - exact).norm() <= bound * exact.norm()
    assert d_hidden[targets == IGNORED].abs().max() == 0

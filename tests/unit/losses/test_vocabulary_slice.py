"""Losses spread by vocabulary, with all slices in one process, equal the whole loss for any cut of the rows."""

import pytest
import torch

from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.losses.vocabulary_slice import combine_statistics, slice_gradients, slice_statistics
from megamtp.targets import IGNORED

POSITIONS, WIDTH, VOCABULARY = 23, 8, 40
CUTS = {"whole": [40], "even": [20, 20], "uneven": [1, 30, 7, 2]}


def make_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (hidden states, weight, targets); targets include IGNORED, the first row and the last row."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    targets[::5], targets[1], targets[2] = IGNORED, 0, VOCABULARY - 1
    return hidden, weight, targets


def losses_of_slices(hidden, weight, targets, cut, **options):
    """Returns (nll sum, log-partitions, dH, 2 dW) of the slices together; dW is accumulated over two equal uses."""
    slices = list(zip(weight.split(cut), torch.tensor([0, *cut]).cumsum(0).tolist(), strict=False))
    logits, statistics = zip(*(slice_statistics(hidden, rows, targets, first) for rows, first in slices), strict=True)
    nll, log_partition = combine_statistics(torch.stack(statistics), targets)
    d_weight = [torch.zeros(rows.shape, dtype=nll.dtype) for rows, _ in slices]
    for _ in range(2):
        d_hidden = [
            slice_gradients(slice_logits.clone(), hidden, rows, targets, first, log_partition, d_rows, **options)
            for slice_logits, (rows, first), d_rows in zip(logits, slices, d_weight, strict=True)
        ]
    return nll.sum(), log_partition, torch.stack(d_hidden).sum(0), torch.cat(d_weight)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_slices_equal_the_whole_loss(cut, dtype, bound):
    hidden, weight, targets = make_inputs(dtype)
    nll_sum, log_partition, d_hidden, twice_d_weight = losses_of_slices(
        hidden, weight, targets, CUTS[cut], factor=0.25, z_loss=0.1
    )
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss, exact_nll_sum = linear_cross_entropy(exact_hidden, exact_weight, targets, scale=0.25, z_loss=0.1)
    loss.backward()
    assert nll_sum.item() == pytest.approx(exact_nll_sum.item(), rel=bound)
    assert torch.allclose(log_partition.double(), (hidden.double() @ weight.double().T).logsumexp(1), rtol=bound)
    for gradient, exact in ((d_hidden, exact_hidden.grad), (twice_d_weight / 2, exact_weight.grad)):
        assert (gradient.double() - exact).norm() <= bound * exact.norm()
    assert d_hidden[targets == IGNORED].abs().max() == 0

"""Sequential heads: which gradients they sum, when, and in which precision."""

import torch

from megamtp.losses.linear_cross_entropy import SharedGradient
from megamtp.losses.sequential import HeadHooks, IntermediateStageHeads, SequentialHeadLoss

# In bf16, numbers from 256 to 512 are even: 256 + 1 + 1 + ... stays 256. The exact sum, 264, is representable.
CONTRIBUTIONS = [256.0] + 8 * [1.0]


def test_dz_is_summed_in_fp32():
    z = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)

    def head_loss(index, z_head):
        loss = (z_head.float() * CONTRIBUTIONS[index]).sum()
        return loss, loss.detach()

    loss, nll_sums = SequentialHeadLoss.apply(z, head_loss, len(CONTRIBUTIONS), HeadHooks())
    loss.backward()
    assert torch.equal(z.grad, torch.full_like(z, 264.0))
    assert nll_sums.shape == (len(CONTRIBUTIONS),)


def test_dw_is_summed_in_fp32():
    shared = SharedGradient(num_uses=len(CONTRIBUTIONS))
    for contribution in CONTRIBUTIONS:
        shared.add_product(
            torch.full((4, 1), contribution, dtype=torch.bfloat16), torch.ones(1, 3, dtype=torch.bfloat16)
        )
    totals = [shared.take_if_last() for _ in CONTRIBUTIONS]
    assert totals[:-1] == [None] * (len(CONTRIBUTIONS) - 1)
    assert torch.equal(totals[-1], torch.full((4, 3), 264.0))


def two_heads():
    """Returns z, the heads' shared weight, and head_loss(index, z) = sum of (index + 1) * weight * z."""
    weight = torch.ones(3, requires_grad=True)

    def head_loss(index, z_head):
        loss = ((index + 1) * weight * z_head).sum()
        return loss, loss.detach()

    return torch.arange(3.0, requires_grad=True), weight, head_loss


def test_parameter_gradients_exist_after_forward_and_dz_after_backward():
    z, weight, head_loss = two_heads()
    loss, _ = SequentialHeadLoss.apply(z, head_loss, 2, HeadHooks())
    assert torch.equal(weight.grad, 3 * z.detach())
    assert z.grad is None
    (loss * 10).backward()
    assert torch.equal(z.grad, torch.full((3,), 30.0))


def test_heads_of_an_intermediate_stage_add_their_dz_to_that_of_later_stages():
    z, weight, head_loss = two_heads()
    forwarded_z, nll_sums = IntermediateStageHeads.apply(z, head_loss, 2, HeadHooks())
    assert torch.equal(weight.grad, 3 * z.detach())
    assert torch.equal(forwarded_z, z)
    assert nll_sums.tolist() == [3.0, 6.0]
    (forwarded_z * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert torch.equal(z.grad, torch.tensor([4.0, 13.0, 103.0]))
    assert torch.equal(weight.grad, 3 * z.detach())

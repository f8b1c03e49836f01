"""Head after head: forward, loss and backward of one head before the next begins, all inside one autograd function.

To the trunk it looks like a loss whose gradient with respect to z is known at once. To an engine it looks like part of
the forward pass, which it is not: the heads' parameters get their gradients here. A `HeadPhase` tells the engine.

Source: Gloeckle et al. 2024, arXiv:2404.19737, section 2 and figure 2.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megamtp.losses.linear_cross_entropy import wide

HeadLoss = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class HeadPhase:
    """What an engine does around the heads. This one does nothing: it serves a plain module without an engine."""

    def seed(self) -> float:
        """The gradient with which the engine will start the backward pass of this micro-batch's loss."""
        return 1.0

    @contextlib.contextmanager
    def all_heads(self) -> Iterator[None]:
        """Around the heads of one micro-batch in which gradients are computed."""
        yield

    @contextlib.contextmanager
    def one_head(self, index: int) -> Iterator[None]:
        """Around forward and backward of the head at `index` (from 0)."""
        yield


class SequentialHeadLoss(torch.autograd.Function):
    """(z, head_loss, num_heads, phase) -> (sum of the heads' losses, their summed negative log-likelihoods [n]).

    `head_loss(index, z)` is one head's (loss, nll_sum). Parameters' gradients are accumulated during the forward call,
    seeded with `phase.seed()`; backward only returns dz, which was summed over the heads in fp32, so it must follow
    with that same seed.
    """

    @staticmethod
    def forward(
        ctx: Any, z_BTD: Tensor, head_loss: HeadLoss, num_heads: int, phase: HeadPhase
    ) -> tuple[Tensor, Tensor]:
        ctx.seed = phase.seed()
        dz_BTD, loss, nll_sums = _run_heads(z_BTD, head_loss, num_heads, phase, ctx.seed)
        ctx.save_for_backward(dz_BTD)
        ctx.mark_non_differentiable(nll_sums)
        return loss, nll_sums

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None]:
        (dz_BTD,) = ctx.saved_tensors
        return (dz_BTD * (d_loss / ctx.seed)).to(dz_BTD.dtype), None, None, None


class PassingHeads(torch.autograd.Function):
    """(z, head_loss, num_heads, phase) -> (z, summed negative log-likelihoods [n]): heads that z passes on its way to
    others.

    As SequentialHeadLoss, but the gradient that comes back is that of z, seeded already; backward adds these heads' dz
    to it.
    """

    @staticmethod
    def forward(
        ctx: Any, z_BTD: Tensor, head_loss: HeadLoss, num_heads: int, phase: HeadPhase
    ) -> tuple[Tensor, Tensor]:
        dz_BTD, _, nll_sums = _run_heads(z_BTD, head_loss, num_heads, phase, phase.seed())
        ctx.save_for_backward(dz_BTD)
        ctx.mark_non_differentiable(nll_sums)
        return z_BTD.view_as(z_BTD), nll_sums

    @staticmethod
    def backward(ctx: Any, dz_of_others_BTD: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None]:
        (dz_BTD,) = ctx.saved_tensors
        return dz_of_others_BTD + dz_BTD, None, None, None


def _run_heads(
    z_BTD: Tensor, head_loss: HeadLoss, num_heads: int, phase: HeadPhase, seed: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, sum of the losses, summed negative log-likelihoods), after forward and backward of each head in turn."""
    dz_BTD, losses, nll_sums = None, [], []
    with phase.all_heads():
        for index in range(num_heads):
            z_head_BTD = z_BTD.detach().requires_grad_()
            with phase.one_head(index), torch.enable_grad():
                loss, nll_sum = head_loss(index, z_head_BTD)
                torch.autograd.backward(loss, torch.full_like(loss, seed))
            assert z_head_BTD.grad is not None
            dz_BTD = z_head_BTD.grad.to(wide(z_BTD.dtype)) if dz_BTD is None else dz_BTD.add_(z_head_BTD.grad)
            losses.append(loss.detach())
            nll_sums.append(nll_sum)
    assert dz_BTD is not None
    return dz_BTD.to(z_BTD.dtype), torch.stack(losses).sum(), torch.stack(nll_sums)

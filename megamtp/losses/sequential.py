"""Sequential heads: forward, loss and backward of one head before the next starts, in one autograd function.

For the trunk, the heads are one function whose gradient with respect to z is known after its forward pass. For an
engine, gradients of the heads' parameters appear during the forward pass; `HeadHooks` lets it prepare for that.

Source: Gloeckle et al. 2024, arXiv:2404.19737, section 2 and figure 2.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megamtp.losses.linear_cross_entropy import accumulation_dtype

# (local index of a head, from 0 among the heads of this part; z) -> (loss, summed negative log-likelihood)
HeadLoss = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class HeadHooks:
    """Hooks that an engine runs around sequential heads. This base class, for a model without engine, does nothing."""

    def loss_gradient(self) -> float:
        """Returns the gradient that the loss will receive in this micro-batch's outer backward pass.

        Engines scale the loss before they call backward(), for example by the fp16 loss scale. The heads' backward
        passes start from the same gradient.
        """
        return 1.0

    @contextlib.contextmanager
    def all_heads(self) -> Iterator[None]:
        """Context around the forward and backward passes of all heads for one micro-batch."""
        yield

    @contextlib.contextmanager
    def one_head(self, local_index: int) -> Iterator[None]:
        """Context around the forward and backward pass of the head at `local_index` (from 0) of this part."""
        yield


class SequentialHeadLoss(torch.autograd.Function):
    """(z, head_loss, num_heads, hooks) -> (loss summed over heads, summed negative log-likelihoods [n]).

    The forward call accumulates the gradients of the heads' parameters, starting from `hooks.loss_gradient()`, and sums
    dz over the heads in fp32. Backward only returns dz. In training it must receive the same loss gradient:
    another gradient rescales dz, but not the parameters' gradients, which are already computed.
    """

    @staticmethod
    def forward(
        ctx: Any, z_BTD: Tensor, head_loss: HeadLoss, num_heads: int, hooks: HeadHooks
    ) -> tuple[Tensor, Tensor]:
        ctx.loss_gradient = hooks.loss_gradient()
        dz_BTD, loss, nll_sums = _run_heads(z_BTD, head_loss, num_heads, hooks, ctx.loss_gradient)
        ctx.save_for_backward(dz_BTD)
        ctx.mark_non_differentiable(nll_sums)
        return loss, nll_sums

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None]:
        (dz_BTD,) = ctx.saved_tensors
        factor = d_loss / ctx.loss_gradient  # exactly 1 in training
        return (dz_BTD * factor).to(dz_BTD.dtype), None, None, None


class IntermediateStageHeads(torch.autograd.Function):
    """(z, head_loss, num_heads, hooks) -> (z, summed negative log-likelihoods [n]), on stages that also forward z.

    Like SequentialHeadLoss, but backward receives the dz of the later stages' heads, which already includes the loss
    gradient, and adds the dz of this stage's heads.
    """

    @staticmethod
    def forward(
        ctx: Any, z_BTD: Tensor, head_loss: HeadLoss, num_heads: int, hooks: HeadHooks
    ) -> tuple[Tensor, Tensor]:
        dz_BTD, _, nll_sums = _run_heads(z_BTD, head_loss, num_heads, hooks, hooks.loss_gradient())
        ctx.save_for_backward(dz_BTD)
        ctx.mark_non_differentiable(nll_sums)
        return z_BTD.view_as(z_BTD), nll_sums

    @staticmethod
    def backward(ctx: Any, dz_of_later_stages_BTD: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None]:
        (dz_BTD,) = ctx.saved_tensors
        return dz_of_later_stages_BTD + dz_BTD, None, None, None


class AddedLoss(torch.autograd.Function):
    """(state, loss, loss_gradient) -> state, on stages that also forward the state, for heads that read each other.

    Backward passes the gradient of the state on, and starts the loss's backward pass from `loss_gradient`.
    """

    @staticmethod
    def forward(ctx: Any, state_BTD: Tensor, loss: Tensor, loss_gradient: float) -> Tensor:
        ctx.loss_gradient = torch.full_like(loss, loss_gradient)
        return state_BTD.view_as(state_BTD)

    @staticmethod
    def backward(ctx: Any, d_state_BTD: Tensor) -> tuple[Tensor, Tensor, None]:
        return d_state_BTD, ctx.loss_gradient, None


def _run_heads(
    z_BTD: Tensor, head_loss: HeadLoss, num_heads: int, hooks: HeadHooks, loss_gradient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs forward and backward of each head in turn.

    Returns:
        (dz, loss, summed negative log-likelihoods [n]): dz and loss are sums over the heads.
    """
    dz_BTD, losses, nll_sums = None, [], []
    with hooks.all_heads():
        for local_index in range(num_heads):
            z_head_BTD = z_BTD.detach().requires_grad_()
            with hooks.one_head(local_index), torch.enable_grad():
                loss, nll_sum = head_loss(local_index, z_head_BTD)
                torch.autograd.backward(loss, torch.full_like(loss, loss_gradient))
            assert z_head_BTD.grad is not None
            if dz_BTD is None:
                dz_BTD = z_head_BTD.grad.to(accumulation_dtype(z_BTD.dtype))
            else:
                dz_BTD.add_(z_head_BTD.grad)
            losses.append(loss.detach())
            nll_sums.append(nll_sum)
    assert dz_BTD is not None
    return dz_BTD.to(z_BTD.dtype), torch.stack(losses).sum(), torch.stack(nll_sums)

"""The learning rate as a function of the step alone: a resumed run needs no scheduler state."""

import math

from megamtp.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """Returns the learning rate of `step`: linear warm-up to the peak, then cosine decay to final_lr_ratio * peak.

    Args:
        step: from 1 to num_steps.

    Source: Gloeckle et al. 2024, arXiv:2404.19737, tables S13 and S14.
    """
    if step <= optimizer.warmup_steps:
        return optimizer.lr * step / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(1, num_steps - optimizer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.lr * (optimizer.final_lr_ratio + (1 - optimizer.final_lr_ratio) * cosine)

"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math

from megamtp.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """The rate of `step` (from 1 to num_steps): linear warm-up to the peak, then cosine to final_lr_ratio of it.

    Source: paper.md, tables S13 and S14.
    """
    if step <= optimizer.warmup_steps:
        return optimizer.lr * step / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(1, num_steps - optimizer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.lr * (optimizer.final_lr_ratio + (1 - optimizer.final_lr_ratio) * cosine)

"""Runs megamtp.pretrain, but each rank kills itself with SIGKILL in the middle of step KILLED_STEP."""

import os
import signal

from megamtp import pretrain
from megamtp.model.layers import TransformerLayer
from megamtp.training.loop import Training

KILLED_STEP = 13
NUM_LAYERS_RUN = 2  # layers that each rank runs in that step before it dies


def die_after(num_calls, function):
    remaining = [num_calls]

    def dying_function(*arguments):
        remaining[0] -= 1
        if remaining[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return dying_function


def die_in_killed_step(train_step):
    def dying_train_step(training):
        if training.step == KILLED_STEP:
            TransformerLayer.forward = die_after(NUM_LAYERS_RUN, TransformerLayer.forward)
        return train_step(training)

    return dying_train_step


def entry() -> None:
    Training._train_step = die_in_killed_step(Training._train_step)
    pretrain.entry()


if __name__ == "__main__":
    entry()

"""megamtp.pretrain, except that every rank kills itself with SIGKILL in the middle of step KILLED_STEP."""

import os
import signal

from megamtp import pretrain
from megamtp.model.layers import TransformerLayer
from megamtp.training.loop import Training

KILLED_STEP = 13
LAYERS_RUN = 2  # of that step, by each rank, before it ends


def die_after(calls, function):
    remaining = [calls]

    def wrapped(*arguments):
        remaining[0] -= 1
        if remaining[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return wrapped


def die_in_killed_step(train_step):
    def wrapped(training):
        if training.step == KILLED_STEP:
            TransformerLayer.forward = die_after(LAYERS_RUN, TransformerLayer.forward)
        return train_step(training)

    return wrapped


if __name__ == "__main__":
    Training._train_step = die_in_killed_step(Training._train_step)
    pretrain.entry()

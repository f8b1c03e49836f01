"""megamtp.pretrain, except that every rank kills itself with SIGKILL in the middle of step KILLED_STEP."""

import os
import signal

from megamtp import pretrain
from megamtp.engines.head_phase import DeepSpeedHeadPhase
from megamtp.training.loop import Training

KILLED_STEP = 13


def die_in_killed_step(train_step):
    def wrapped(training):
        if training.step == KILLED_STEP:
            DeepSpeedHeadPhase.seed = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        return train_step(training)

    return wrapped


if __name__ == "__main__":
    Training._train_step = die_in_killed_step(Training._train_step)
    pretrain.entry()

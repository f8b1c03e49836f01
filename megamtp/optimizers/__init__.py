"""The kinds of optimizers, with the state that each keeps, and the learning rate schedule."""

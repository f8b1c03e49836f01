"""Optimizers: how each is made and what state it keeps; and the learning rate's schedule."""

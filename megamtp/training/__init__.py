"""The training loop and everything around it: checks before the start, metrics, checkpoints, resuming."""

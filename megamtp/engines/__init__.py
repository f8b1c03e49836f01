"""Engines train the model on many ranks. The training loop uses only base.Engine; build.py builds the engine."""

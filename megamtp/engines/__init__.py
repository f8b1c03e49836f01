"""Engines host the model on many ranks. The training loop knows base.Engine alone; build.py picks one."""

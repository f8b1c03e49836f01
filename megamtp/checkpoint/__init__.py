"""Checkpoints: how they are published and found (store.py), and what they can be turned into (hf.py)."""

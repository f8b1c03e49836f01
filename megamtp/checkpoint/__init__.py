"""Checkpoints: what is in them (shards.py), how they are published and found (store.py), and what they become
(hf.py).
"""

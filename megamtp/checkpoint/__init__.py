"""Checkpoints: their tensors (shards.py), their folders (store.py), and conversion between formats (formats.py)."""

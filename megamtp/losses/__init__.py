"""Losses as autograd functions: the fused unembedding + cross-entropy, and the head-by-head forward and backward."""

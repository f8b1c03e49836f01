"""The target value that losses ignore: datasets write it, and losses skip its positions.

Tests: tests/unit/losses/test_softmax_gradient.py.
"""

IGNORED = -100  # the default ignore_index of torch's cross-entropy

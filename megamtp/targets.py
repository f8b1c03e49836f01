"""The value of targets that do not count: data sets write it, losses skip it.

Tests: tests/unit/losses/test_softmax_gradient.py.
"""

IGNORED = -100  # torch's own convention

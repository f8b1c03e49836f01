"""The value of targets that do not count: data sets write it, losses skip it."""

IGNORED = -100  # torch's own convention

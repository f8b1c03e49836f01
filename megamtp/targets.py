"""The target value that losses ignore: datasets write it, and losses skip its positions."""

IGNORED = -100  # the default ignore_index of torch's cross-entropy

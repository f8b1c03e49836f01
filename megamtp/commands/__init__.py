"""Command lines: pretrain lives beside this package, the other tools in it."""

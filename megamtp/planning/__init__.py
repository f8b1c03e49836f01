"""Arithmetic before a run: partitions into stages, schedules, memory and times. No process groups, no DeepSpeed."""

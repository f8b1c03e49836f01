"""Arithmetic before a run: cuts into stages, schedules, memory and times. No process group and no DeepSpeed."""

"""What tools/benchmark.py measures, and the baselines that it measures against."""

"""The benchmarks of tools/benchmark.py, and the baselines with which they compare megamtp."""

"""The CPU clock, which smoke runs use without a GPU."""

import time

import pytest
import torch
from benchmarks.device import find_device, record_time, seconds_between, synchronize


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cpu_times():
    device = find_device()
    assert device == torch.device("cpu")
    start = record_time(device)
    time.sleep(0.02)
    synchronize(device)
    assert 0.02 <= seconds_between(start, record_time(device)) < 10

"""The planner's GPUs are found by the names that torch gives to devices."""

import pytest

from megamtp.planning.gpus import GPUS, find_gpu


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H200 MIG 3g.71gb", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_names(name, gpu):
    assert find_gpu(name) is (GPUS[gpu] if gpu else None)

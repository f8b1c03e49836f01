"""The fp8 benchmark: errors of scalings, against known numbers, and its tables."""

import pytest
import torch
from benchmarks import float8

from megamtp.precision.operations import E4M3, E5M2


@pytest.mark.parametrize("scaling", float8.SCALINGS[:3])
def test_a_scale_per_row_or_block_saves_small_rows(scaling):
    """The second row is 2^-20 of the first, which e4m3 cannot hold with one scale; e5m2 can."""
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    x[1] = 2.0**-20
    for dtype, survives in ((E4M3, scaling != "tensor"), (E5M2, True)):
        restored = float8._rounded(x, dtype, scaling)
        torch.testing.assert_close(restored[0], x[0].double())
        torch.testing.assert_close(restored[1], x[1].double() * survives, rtol=1e-6, atol=0)


def test_tables():
    error = {"output": 0.037, "input_gradient": 0.0591, "weight_gradient": 0.05}
    results = [{"operands": "normal", "scaling": "tensor"} | error, {"run": "bf16", "milliseconds": [1.0, 2.0, 3.0]}]
    results.append({"run": "fp8, scale per tensor", "milliseconds": [1.0], "accumulation_error": 0.0017})
    tables = float8.tables(results)
    assert "| normal | tensor | 3.70% | 5.91% | 5.00% |" in tables
    assert "| bf16 | 2.000 [1.000, 3.000] | - |" in tables
    assert "| fp8, scale per tensor | 1.000 [1.000, 1.000] | 0.170% |" in tables
    assert "bf16" not in float8.tables(results[:1])

"""The table of the layer benchmark, and its count of bytes."""

import sys

import pytest
from benchmarks import layer

from megamtp.errors import InputError


def _result(precision: str, milliseconds: list[float]) -> dict:
    parts = {"products": 6.0, "attention": 2.0, "traffic": 2.0, "floor": 10.0}
    times = {"forward_milliseconds": [4.0, 4.0], "milliseconds": milliseconds}
    return {"size": "6.7b", "precision": precision, "dim": 4096, "positions": 8192} | parts | times


def test_table_compares_the_layer_with_its_parts():
    lines = layer.tables([_result("bf16", [16.0, 17.0, 18.0]), _result("fp8", [11.0, 11.0, 12.0])]).splitlines()
    times = "4.00 [4.00, 4.00] | 17.00 [16.00, 18.00]"
    assert lines[2] == f"| 6.7b | bf16 | 4096 | 8192 | {times} | 6.00 | 2.00 | 2.00 | 10.00 | 1.700 |"
    assert lines[3].endswith("| 1.100 |")


def test_memory_traffic_of_a_position():
    """Counted by hand for a layer of width 1 with one number each of keys, values and SwiGLU."""
    norms, rotation, sums, swiglu = 2 * (2 + 5) * 2, 4 * 2 * 2, 6 * 2, (3 + 6) * 2
    assert layer._traffic(False, 1, 1, 1) == norms + rotation + sums + swiglu
    float8_norms = (2 + 1) + (4 + 2 + 1) + 2 * (6 + 2)  # the second with its sum
    # largest magnitude, then quantisation with the transpose: forward 4 + 4 + 2; backward 6 + 6 + 4
    float8_swiglu = 10 + 16
    # largest magnitude, and reading and writing with the transpose: attention's output, two gradients of 1 number, and
    # one gradient of 3
    quantisation = 3 * (2 + 2 + 2) + (2 + 2 + 2) * 3
    transposes = 2 * (1 + 1)  # two norms
    assert layer._traffic(True, 1, 1, 1) == float8_norms + rotation + 6 + float8_swiglu + quantisation + transposes


def test_torchao_must_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InputError, match=r"^--torchao: .*; expected torchao: pip install torchao$"):
        layer._import_torchao()

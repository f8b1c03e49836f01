"""The comparison of gradients, on invented ones with known angles."""

import torch
from benchmarks import gradients


def test_each_kind_of_parameter_has_a_row():
    straight, turned, opposite = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]), torch.tensor([-2.0, 0.0])
    by_precision = {
        "fp32": {"trunk.0.attention.query.weight": straight, "trunk.1.attention.query.weight": straight},
        "bf16": {"trunk.0.attention.query.weight": straight, "trunk.1.attention.query.weight": turned},
        "fp8": {"trunk.0.attention.query.weight": turned, "trunk.1.attention.query.weight": opposite},
    }
    (result,) = gradients.compare(by_precision)
    assert result["parameter"] == "trunk attention.query.weight"
    for pair, expected in {"fp8 bf16": [0.6, -0.6], "fp8 fp32": [0.6, -1.0], "bf16 fp32": [1.0, 0.6]}.items():
        torch.testing.assert_close(result[pair], expected)
    row = gradients.tables([result]).splitlines()[-1]
    expected = "0.00000 [-0.60000] | -0.20000 [-1.00000] | 0.80000 [0.60000]"
    assert row == f"| trunk attention.query.weight | 2 | {expected} |"

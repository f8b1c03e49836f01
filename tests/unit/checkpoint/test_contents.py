"""What a checkpoint holds: its shapes, the tensors that are missing or unknown, and rows of other tensors."""

import torch

from megamtp.checkpoint.contents import Rearranged, Rows
from megamtp.checkpoint.tensors import InMemory


def test_rows_of_a_tensor_are_read_by_slice():
    source = InMemory({"a": torch.arange(24.0).view(6, 2, 2), "b": torch.arange(5.0)})
    rows = torch.tensor([4, 5, 0, 1, 3])
    found = Rearranged(source, {"x": Rows("a", rows), "y": Rows("b")})
    assert found.shapes == {"x": (5, 2, 2), "y": (5,)}
    expected = source.weights["a"][rows].flatten()
    for start in range(len(expected) + 1):
        for end in (*range(start, len(expected) + 1), None):
            assert torch.equal(found.read("x", start, end), expected[start:end])
    assert torch.equal(found.read("y", 1, 3), torch.tensor([1.0, 2.0]))

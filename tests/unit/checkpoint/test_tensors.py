"""Tensors in memory are read by slices."""

import pytest
import torch

from megamtp.checkpoint.tensors import InMemory, read_tensor

MATRIX = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("matrix", [MATRIX, MATRIX.t().contiguous().t()], ids=["contiguous", "transposed"])
def test_slices_are_row_major(matrix):
    source = InMemory({"matrix": torch.nn.Parameter(matrix)})
    assert source.shapes == {"matrix": (3, 4)}
    for start in range(13):
        for end in range(start, 13):
            assert source.read("matrix", start, end).tolist() == list(range(start, end))
    assert source.read("matrix", 7).tolist() == [7, 8, 9, 10, 11]
    assert source.read("matrix").tolist() == list(range(12))


def test_read_tensor_returns_the_shape_and_the_requested_dtype():
    source = InMemory({"matrix": MATRIX})
    assert torch.equal(read_tensor(source, "matrix"), MATRIX)
    assert torch.equal(read_tensor(source, "matrix", torch.bfloat16), MATRIX.bfloat16())

"""Tensors in memory, read by slice."""

import pytest
import torch

from megamtp.checkpoint.tensors import InMemory, whole

MATRIX = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("matrix", [MATRIX, MATRIX.t().contiguous().t()], ids=["contiguous", "transposed"])
def test_slices_are_of_the_row_major_numbers(matrix):
    source = InMemory({"matrix": torch.nn.Parameter(matrix)})
    assert source.shapes == {"matrix": (3, 4)}
    for start in range(13):
        for end in range(start, 13):
            assert source.read("matrix", start, end).tolist() == list(range(start, end))
    assert source.read("matrix", 7).tolist() == [7, 8, 9, 10, 11]
    assert source.read("matrix").tolist() == list(range(12))


def test_a_whole_tensor_has_its_shape_and_the_dtype_that_is_asked_for():
    source = InMemory({"matrix": MATRIX})
    assert torch.equal(whole(source, "matrix"), MATRIX)
    assert torch.equal(whole(source, "matrix", torch.bfloat16), MATRIX.bfloat16())

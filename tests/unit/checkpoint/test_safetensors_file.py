"""Safetensors files: compatible with the safetensors library, read and written by slices, damaged files refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megamtp.checkpoint import safetensors_file
from megamtp.checkpoint.safetensors_file import SafetensorsFiles, split
from megamtp.checkpoint.tensors import InMemory, read_tensor
from megamtp.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"a": (7, 5), "b": (3,), "c": (4, 2, 3)}.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_library_reads_files_that_are_written_by_slices(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(safetensors_file, "SLICE_ELEMENTS", 4)
    expected = tensors()
    safetensors_file.write(tmp_path / "file", InMemory(expected), ["c", "a", "b"], dtype)
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name].to(dtype)) for name in expected)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers requires it


def test_files_of_the_library_are_read_by_slices(tmp_path):
    expected = tensors() | {"half": torch.randn(9).bfloat16()}
    save_file(expected, tmp_path / "file")
    opened = SafetensorsFiles([tmp_path / "file"])
    assert opened.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(read_tensor(opened, name), tensor)
        for start, end in ((0, 2), (1, None), (2, 2), (1, 3)):
            assert torch.equal(opened.read(name, start, end), tensor.flatten()[start:end])


def test_files_are_filled_in_order_up_to_their_limit(monkeypatch):
    monkeypatch.setattr(safetensors_file, "LARGEST_FILE_BYTES", 80)
    shapes = {"a": (10,), "b": (5, 2), "c": (30,), "d": (1,), "e": ()}
    assert split(shapes, itemsize=4) == [["a", "b"], ["c"], ["d", "e"]]


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_truncated_file_is_refused_in_one_line(tmp_path, size):
    save_file(tensors(), tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"not a complete safetensors file[^\n]*$"):
        SafetensorsFiles([tmp_path / "file"])


def test_other_types_and_duplicate_tensors_are_refused(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "one")
    save_file({"a": torch.zeros(3)}, tmp_path / "two")
    save_file({"a": torch.zeros(3, dtype=torch.int32)}, tmp_path / "integers")
    with pytest.raises(CheckpointError, match="both have tensor a"):
        SafetensorsFiles([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(CheckpointError, match="tensor a is of type I32"):
        SafetensorsFiles([tmp_path / "integers"])


def test_file_that_is_removed_after_opening_is_refused(tmp_path):
    save_file(tensors(), tmp_path / "file")
    opened = SafetensorsFiles([tmp_path / "file"])
    (tmp_path / "file").unlink()
    with pytest.raises(CheckpointError, match="file can no longer be read"):
        opened.read("a")


def test_numbers_beyond_fp16_are_refused(tmp_path):
    source = InMemory({"a": torch.tensor([1.0, 65504.0, float("inf")]), "b": torch.tensor([0.0, -1e5])})
    safetensors_file.write(tmp_path / "file", source, ["a"], torch.float16)
    assert load_file(tmp_path / "file")["a"].tolist() == [1.0, 65504.0, float("inf")]
    with pytest.raises(CheckpointError, match=r"b holds 1e\+05; expected at most 65504"):
        safetensors_file.write(tmp_path / "file", source, ["a", "b"], torch.float16)

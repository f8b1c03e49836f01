"""Files written slice by slice against the safetensors library; reading by slice; damaged files."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megamtp.checkpoint import safetensors_file
from megamtp.checkpoint.safetensors_file import SafetensorsFiles, split
from megamtp.checkpoint.tensors import InMemory, whole
from megamtp.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"a": (7, 5), "b": (3,), "c": (4, 2, 3)}.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_was_written_in_slices(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(safetensors_file, "SLICE_ELEMENTS", 4)
    expected = tensors()
    safetensors_file.write(tmp_path / "file", InMemory(expected), ["c", "a", "b"], dtype)
    found = load_file(tmp_path / "file")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it, transformers refuses the file


def test_slices_of_what_the_library_wrote(tmp_path):
    expected = tensors() | {"half": torch.randn(9).bfloat16()}
    save_file(expected, tmp_path / "file")
    found = SafetensorsFiles([tmp_path / "file"])
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(whole(found, name), tensor)
        for start, end in ((0, 2), (1, None), (2, 2), (1, 3)):
            assert torch.equal(found.read(name, start, end), tensor.flatten()[start:end])


def test_files_are_filled_in_order_up_to_their_limit(monkeypatch):
    monkeypatch.setattr(safetensors_file, "LARGEST_FILE_BYTES", 80)
    shapes = {"a": (10,), "b": (5, 2), "c": (30,), "d": (1,), "e": ()}
    assert split(shapes, itemsize=4) == [["a", "b"], ["c"], ["d", "e"]]


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, size):
    save_file(tensors(), tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"no whole safetensors file[^\n]*$"):
        SafetensorsFiles([tmp_path / "file"])


def test_other_types_and_a_tensor_in_two_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "one")
    save_file({"a": torch.zeros(3)}, tmp_path / "two")
    save_file({"a": torch.zeros(3, dtype=torch.int32)}, tmp_path / "integers")
    with pytest.raises(CheckpointError, match="both have tensor a"):
        SafetensorsFiles([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(CheckpointError, match="tensor a is of type I32"):
        SafetensorsFiles([tmp_path / "integers"])


def test_a_file_that_is_removed_while_it_is_read_is_refused(tmp_path):
    save_file(tensors(), tmp_path / "file")
    found = SafetensorsFiles([tmp_path / "file"])
    (tmp_path / "file").unlink()
    with pytest.raises(CheckpointError, match="file cannot be read any more"):
        found.read("a")


def test_what_fp16_cannot_hold_is_refused(tmp_path):
    source = InMemory({"a": torch.tensor([1.0, 65504.0, float("inf")]), "b": torch.tensor([0.0, -1e5])})
    safetensors_file.write(tmp_path / "file", source, ["a"], torch.float16)
    assert load_file(tmp_path / "file")["a"].tolist() == [1.0, 65504.0, float("inf")]
    with pytest.raises(CheckpointError, match=r"b holds 1e\+05; expected at most 65504"):
        safetensors_file.write(tmp_path / "file", source, ["a", "b"], torch.float16)

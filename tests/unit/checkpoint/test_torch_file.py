"""Files of torch.save: torch reads files that are written by slices, and unsafe or damaged files are refused."""

import zipfile
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint import safetensors_file, torch_file
from megamtp.checkpoint.tensors import InMemory
from megamtp.checkpoint.torch_file import StreamedTensor
from megamtp.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_files_that_are_written_by_slices(tmp_path, monkeypatch, dtype, mmap):
    monkeypatch.setattr(safetensors_file, "SLICE_ELEMENTS", 4)
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3), "c": torch.randn(2, 2, 2), "d": torch.randn(())}
    source = InMemory(tensors)
    content = {name: StreamedTensor(source, name, dtype) for name in tensors} | {
        "deep": [{"again": StreamedTensor(source, "a", dtype)}, 7]
    }
    torch_file.write(tmp_path / "file", content)
    loaded = torch.load(tmp_path / "file", mmap=mmap, weights_only=True)
    assert all(torch.equal(loaded[name], tensors[name].to(dtype)) for name in tensors)
    assert torch.equal(loaded["deep"][0]["again"], tensors["a"].to(dtype))
    assert loaded["deep"][1] == 7
    assert all(loaded[name].data_ptr() % 64 == 0 for name in tensors) or not mmap
    with zipfile.ZipFile(tmp_path / "file") as archive:
        assert archive.testzip() is None  # checks the checksums


class Program:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [Program(), {"weight": Program()}])
def test_file_that_would_run_code_is_refused(tmp_path, content, capsys):
    torch.save(content, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"file cannot be read [^\n]*$"):
        torch_file.read(tmp_path / "file")
    assert "run" not in capsys.readouterr().out


def test_truncated_and_missing_files_are_refused_in_one_line(tmp_path):
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole")
    (tmp_path / "truncated").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    for name in ("truncated", "missing"):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read [^\n]*$"):
            torch_file.read(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "b is of type int, expected a tensor"),
        (
            torch.zeros(3, dtype=torch.int8),
            "b is a tensor of torch.int8, .*; expected a dense tensor of floating-point numbers",
        ),
        (torch.eye(3).to_sparse(), "b is a tensor of torch.float32, torch.sparse_coo on cpu; expected a dense tensor"),
        (
            torch.zeros(3, device="meta"),
            "b is a tensor of torch.float32, torch.strided on meta; expected a dense tensor",
        ),
    ],
)
def test_values_that_are_not_weights_are_refused(tmp_path, value, message):
    with pytest.raises(CheckpointError, match=message):
        torch_file.require_tensors(tmp_path / "file", {"a": torch.zeros(3), "b": value})


def old_file(path: Path, content) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def test_old_format_is_read_with_a_warning(tmp_path, capsys):
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16()}
    path = old_file(tmp_path / "old", tensors)
    loaded = torch_file.read(path)
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megamtp: warning: {path} is in torch's old format")
    assert line.endswith(f"it takes {path.stat().st_size:,} bytes of memory")


def test_damaged_file_of_the_old_format_is_refused_in_one_line(tmp_path, capsys):
    """Unpickling damaged files raises many kinds of errors."""
    content = old_file(tmp_path / "old", {"weight": torch.zeros(4)}).read_bytes()
    refused = 0
    for offset in range(0, len(content), 3):
        (tmp_path / "damaged").write_bytes(content[:offset] + bytes([content[offset] ^ 0xFF]) + content[offset + 1 :])
        (tmp_path / "truncated").write_bytes(content[:offset])
        with pytest.raises(CheckpointError, match=r"truncated cannot be read [^\n]*$"):
            torch_file.read(tmp_path / "truncated")
        try:
            torch_file.read(tmp_path / "damaged")  # damage to the numbers is not detected
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(content) // 6
    with pytest.raises(CheckpointError, match=r"program cannot be read [^\n]*$"):
        torch_file.read(old_file(tmp_path / "program", Program()))
    assert "run" not in capsys.readouterr().out


def test_tensors_that_are_not_contiguous_are_read_by_slice():
    tensors = {
        "transposed": torch.randn(5, 4).t(),
        "deep": torch.randn(2, 3, 4).permute(2, 0, 1),
        "strided": torch.randn(12)[::3],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
    }
    source = InMemory(tensors)
    for name, tensor in tensors.items():
        expected = tensor.detach().flatten()
        for start in range(len(expected) + 1):
            for end in (*range(start, len(expected) + 1), None):
                assert torch.equal(source.read(name, start, end), expected[start:end])
        assert not source.read(name).requires_grad


def test_full_disk_raises_os_error():
    """torch.save would raise RuntimeError."""
    with pytest.raises(OSError, match="No space left on device"):
        torch_file.write_small(Path("/dev/full"), {"step": torch.tensor(7.0)})

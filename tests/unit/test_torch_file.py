"""Files of torch.save that were written slice by slice, read by torch; what is refused when reading."""

import zipfile
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint import safetensors_file, torch_file
from megamtp.checkpoint.tensors import InMemory
from megamtp.checkpoint.torch_file import Streamed
from megamtp.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_was_written_in_slices(tmp_path, monkeypatch, dtype, mmap):
    monkeypatch.setattr(safetensors_file, "SLICE_ELEMENTS", 4)
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3), "c": torch.randn(2, 2, 2), "d": torch.randn(())}
    source = InMemory(tensors)
    content = {name: Streamed(source, name, dtype) for name in tensors} | {"deep": [{"again": Streamed(source, "a", dtype)}, 7]}
    torch_file.write(tmp_path / "file", content)
    found = torch.load(tmp_path / "file", mmap=mmap, weights_only=True)
    assert all(torch.equal(found[name], tensors[name].to(dtype)) for name in tensors)
    assert torch.equal(found["deep"][0]["again"], tensors["a"].to(dtype))
    assert found["deep"][1] == 7
    assert all(found[name].data_ptr() % 64 == 0 for name in tensors) or not mmap
    with zipfile.ZipFile(tmp_path / "file") as archive:
        assert archive.testzip() is None  # checksums


class Program:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [Program(), {"weight": Program()}])
def test_a_file_that_would_run_a_program_is_refused(tmp_path, content, capsys):
    torch.save(content, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"file cannot be read [^\n]*$"):
        torch_file.read(tmp_path / "file")
    assert "run" not in capsys.readouterr().out


def test_truncated_old_and_other_files_are_refused_in_one_line(tmp_path):
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole")
    (tmp_path / "truncated").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    torch.save({"a": torch.zeros(100)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    for name in ("truncated", "old", "missing"):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read [^\n]*$"):
            torch_file.read(tmp_path / name)
    with pytest.raises(CheckpointError, match="b is a int, expected a contiguous tensor"):
        torch_file.tensors_of(tmp_path / "whole", {"a": torch.zeros(3), "b": 3})


def test_a_full_disk_is_an_os_error():
    """Which torch.save turns into a RuntimeError."""
    with pytest.raises(OSError, match="No space left on device"):
        torch_file.write_small(Path("/dev/full"), {"step": torch.tensor(7.0)})

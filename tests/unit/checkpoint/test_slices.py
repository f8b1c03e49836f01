"""slices.json: its content for hand-written files."""

import json
import zlib

import torch

from megamtp.checkpoint.slices import FileSlices, WrittenFile, file_slices, write_slices
from megamtp.checkpoint.tensors import InMemory


def test_slices_of_a_file_are_those_of_its_weights():
    """Optimizer tensors have the same bounds, random states belong to no parameter, and names may contain "@"."""
    tensors = {
        "weight/matrix@40": torch.zeros(20),
        "weight/matrix@0": torch.zeros(17),
        "weight/a@b@0": torch.zeros(4),
        "exp_avg/matrix@40": torch.zeros(20),
        "random/cpu": torch.zeros(3, dtype=torch.uint8),
    }
    slices = file_slices(InMemory(tensors), {"matrix": (6, 10), "a@b": (4,), "elsewhere": (2, 2)})
    assert slices == FileSlices({"matrix": (6, 10), "a@b": (4,)}, {"matrix": [(40, 60), (0, 17)], "a@b": [(0, 4)]})


def test_content_of_the_file(tmp_path):
    files = {
        "first": FileSlices({"matrix": (6, 10)}, {"matrix": [(0, 17), (40, 60)]}),
        "empty": FileSlices({}, {}),
        "last": FileSlices({"matrix": (6, 10), "vector": (4,)}, {"matrix": [(17, 40)], "vector": [(0, 4)]}),
    }
    written = write_slices(tmp_path / "slices.json", files)
    content = (tmp_path / "slices.json").read_bytes()
    assert json.loads(content) == {
        "shapes": {"matrix": [6, 10], "vector": [4]},
        "files": ["first", "empty", "last"],
        "slices": {"matrix": [[0, 0, 17], [0, 40, 60], [2, 17, 40]], "vector": [[2, 0, 4]]},
    }
    assert written == WrittenFile(len(content), zlib.crc32(content))

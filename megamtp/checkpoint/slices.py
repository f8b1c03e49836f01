"""slices.json lists which elements of the tensors each file of a checkpoint holds.

    {"shapes": {NAME: [rows, columns]}, "files": [FILE, ...], "slices": {NAME: [[file, first element, end], ...]}}

`file` is an index into "files". When a job of another size resumes, each rank reads slices.json and then opens only the
files that hold its elements.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megamtp.checkpoint.tensors import WEIGHT, TensorSource

SLICES = "slices.json"


@dataclass(frozen=True)
class WrittenFile:
    """The size and the CRC-32 (zlib) of a file, as the manifest lists them."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class FileSlices:
    """The elements that a file holds.

    Attributes:
        shapes: the shapes of the whole tensors, by name.
        bounds: (first element, end) of each slice of WEIGHT, by name. Slices of other kinds have the same bounds.
    """

    shapes: dict[str, tuple[int, ...]]
    bounds: dict[str, list[tuple[int, int]]]


def file_slices(slices: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> FileSlices:
    """Returns the elements in the file that `write_shard` writes from the same arguments."""
    bounds: dict[str, list[tuple[int, int]]] = {}
    for key, (size,) in slices.shapes.items():
        kind, _, slice_name = key.partition("/")
        if kind == WEIGHT:
            name, start = slice_name.rsplit("@", 1)
            bounds.setdefault(name, []).append((int(start), int(start) + size))
    return FileSlices({name: tuple(shapes[name]) for name in bounds}, bounds)


def write_slices(path: Path, files: Mapping[str, FileSlices]) -> WrittenFile:
    """Writes slices.json, and waits until it is on disk. Raises OSError."""
    shapes: dict[str, tuple[int, ...]] = {}
    slices: dict[str, list[list[int]]] = {}
    for number, file in enumerate(files.values()):
        shapes |= file.shapes
        for name, bounds in file.bounds.items():
            slices.setdefault(name, []).extend([number, start, end] for start, end in bounds)
    content = json.dumps({"shapes": shapes, "files": list(files), "slices": slices}).encode()
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return WrittenFile(len(content), zlib.crc32(content))

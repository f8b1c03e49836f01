"""slices.json: which file of a checkpoint has which elements of its tensors.

    {"shapes": {NAME: [rows, columns]}, "files": [FILE, ...], "slices": {NAME: [[file, first element, end], ...]}}

`file` is an index into "files". A rank of a job of another size reads this one file, and then opens only the files that
have its own elements.
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
    """What a manifest says of a file. `crc32`: zlib's."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class FileSlices:
    """Which elements a file has.

    Attributes:
        shapes: of the whole tensors, by name.
        bounds: (first element, end) of each slice of WEIGHT, by name; those of other kinds begin and end where these
            do.
    """

    shapes: dict[str, tuple[int, ...]]
    bounds: dict[str, list[tuple[int, int]]]


def file_slices(slices: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> FileSlices:
    """Of the file that write_shard makes of the same."""
    bounds: dict[str, list[tuple[int, int]]] = {}
    for key, (size,) in slices.shapes.items():
        kind, _, place = key.partition("/")
        if kind == WEIGHT:
            name, start = place.rsplit("@", 1)
            bounds.setdefault(name, []).append((int(start), int(start) + size))
    return FileSlices({name: tuple(shapes[name]) for name in bounds}, bounds)


def write_slices(path: Path, files: Mapping[str, FileSlices]) -> WrittenFile:
    """Writes slices.json, and waits until it is on disk. Raises OSError: as when the disk is full."""
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

"""Safetensors files written as a stream and read by slice: of a tensor, no more than a slice is ever in memory.

    shards = split(shapes, itemsize=4)
    write(Path("model.safetensors"), source, names, torch.float32)
    source = SafetensorsFiles([Path("model.safetensors")])

Source: the format in the safetensors documentation: the header's length in 8 bytes, the header in JSON, the tensors'
bytes.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megamtp.checkpoint.tensors import TensorSource
from megamtp.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "U8"}
SLICE_ELEMENTS = 2**20  # 4 MiB in fp32: what a conversion holds at a time, and a copy or two of it
LARGEST_FILE_BYTES = 5 * 10**9  # of checkpoints and exports; the header comes on top
LARGEST_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


def slices(num_elements: int) -> Iterable[tuple[int, int]]:
    """(start, end) of the slices in which a tensor of so many elements is copied."""
    return ((start, min(start + SLICE_ELEMENTS, num_elements)) for start in range(0, num_elements, SLICE_ELEMENTS))


def content(source: TensorSource, name: str, dtype: torch.dtype) -> Iterable[memoryview]:
    """A tensor's bytes as `dtype`, row-major, slice by slice. Raises: CheckpointError for what fp16 cannot hold."""
    for start, end in slices(math.prod(source.shapes[name])):
        numbers = source.read(name, start, end)
        narrow = numbers.to(dtype)
        if dtype == torch.float16 and (narrow.isinf() & numbers.isfinite()).any():
            raise CheckpointError(
                f"{name} holds {numbers.abs().max():.3g}; expected at most 65504, as fp16 does: choose bf16 or fp32"
            )
        yield narrow.contiguous().view(torch.uint8).numpy().data


def split(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """The names of each file, in order, so that none is larger than LARGEST_FILE_BYTES unless one tensor alone is."""
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if files[-1] and size + num_bytes > LARGEST_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += num_bytes
    return files


def encode_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """A file's beginning, its length included, for tensors (dtype, shape) that follow each other."""
    header: dict[str, Mapping[str, object]] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins at a multiple of 8
    return len(encoded).to_bytes(8, "little") + encoded


def write(path: Path, source: TensorSource, names: Iterable[str], dtype: torch.dtype) -> None:
    """Writes the named tensors of `source` as `dtype`. Raises OSError."""
    header = encode_header({name: (dtype, source.shapes[name]) for name in names}, {"format": "pt"})
    with open(path, "wb") as stream:
        stream.write(header)
        for name in names:
            for part in content(source, name, dtype):
                stream.write(part)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `offset` in bytes from the file's beginning."""

    file: Path
    offset: int
    dtype: torch.dtype


class SafetensorsFiles:
    """A TensorSource over all tensors of the files, which are looked at when it is made and opened for each slice.

    Raises:
        CheckpointError: a file is missing, damaged or of other types than fp32, fp16 and bf16, or a tensor is in two
            files.
    """

    def __init__(self, files: Iterable[Path]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.entries: dict[str, Entry] = {}
        for file in files:
            try:
                self._add(file)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(
                    f"{file} is no whole safetensors file ({error}); expected one: copy it again"
                ) from None

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read; in the file's type."""
        entry = self.entries[name]
        start, end, _ = slice(start, end).indices(math.prod(self.shapes[name]))
        numbers = torch.empty(end - start, dtype=entry.dtype)
        try:
            with open(entry.file, "rb") as stream:
                stream.seek(entry.offset + start * entry.dtype.itemsize)
                missing = numbers.nbytes - stream.readinto(numbers.view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(
                f"{entry.file} cannot be read any more ({error.strerror}); start again from a whole copy"
            ) from None
        if missing:
            raise CheckpointError(f"{entry.file} ends inside tensor {name}; expected {missing} bytes more")
        return numbers

    def _add(self, file: Path) -> None:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > LARGEST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
            size = os.fstat(stream.fileno()).st_size
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            if name in self.shapes:
                raise CheckpointError(f"{file} and {self.entries[name].file} both have tensor {name}; expected it once")
            if tensor["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {name} is of type {tensor['dtype']}; expected {', '.join(DTYPES)}"
                )
            shape, dtype, (start, end) = tuple(tensor["shape"]), DTYPES[tensor["dtype"]], tensor["data_offsets"]
            if end - start != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"tensor {name} has no room for its shape {list(shape)}")
            self.shapes[name], self.entries[name] = shape, Entry(file, 8 + length + start, dtype)

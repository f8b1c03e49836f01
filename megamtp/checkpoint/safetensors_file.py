"""Writes safetensors files as a stream and reads them by slices, so that only one slice of a tensor is in memory.

    names_of_files = split(shapes, itemsize=4)
    write(Path("model.safetensors"), source, names_of_files[0], torch.float32)
    source = SafetensorsFiles([Path("model.safetensors")])

A file consists of the length of the header (8 bytes), the header (JSON), and the bytes of the tensors.

Source: the documentation of safetensors.
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
SLICE_ELEMENTS = 2**20  # 4 MiB in fp32; a conversion holds one slice and up to two copies of it
LARGEST_FILE_BYTES = 5 * 10**9  # largest file of checkpoints and exports, without its header
LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def slices(num_elements: int) -> Iterable[tuple[int, int]]:
    """Yields the bounds (start, end) of the slices in which a tensor is copied."""
    return ((start, min(start + SLICE_ELEMENTS, num_elements)) for start in range(0, num_elements, SLICE_ELEMENTS))


def content(source: TensorSource, name: str, dtype: torch.dtype) -> Iterable[memoryview]:
    """Yields the bytes of a tensor as `dtype`, row-major, slice by slice.

    Raises:
        CheckpointError: fp16 cannot represent a number.
    """
    for start, end in slices(math.prod(source.shapes[name])):
        numbers = source.read(name, start, end)
        converted = numbers.to(dtype)
        if dtype == torch.float16 and (converted.isinf() & numbers.isfinite()).any():
            raise CheckpointError(
                f"{name} holds {numbers.abs().max():.3g}; expected at most 65504, the limit of fp16: choose bf16 or "
                "fp32"
            )
        yield converted.contiguous().view(torch.uint8).numpy().data


def split(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """Returns the tensor names of each file. A file exceeds LARGEST_FILE_BYTES only if its single tensor does."""
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
    """Returns the header and its length, as bytes.

    Args:
        tensors: {name: (dtype, shape)}, in the order of their data.
        metadata: strings for the header's __metadata__.
    """
    header: dict[str, Mapping[str, object]] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data to 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded


def write(path: Path, source: TensorSource, names: Iterable[str], dtype: torch.dtype) -> None:
    """Writes the named tensors of `source` as `dtype`. Raises OSError."""
    header = encode_header({name: (dtype, source.shapes[name]) for name in names}, {"format": "pt"})
    with open(path, "wb") as stream:
        stream.write(header)
        for name in names:
            for piece in content(source, name, dtype):
                stream.write(piece)


@dataclass(frozen=True)
class Entry:
    """The location of a tensor. `offset` is in bytes from the start of the file."""

    file: Path
    offset: int
    dtype: torch.dtype


class SafetensorsFiles:
    """A TensorSource over all tensors of some files. It reads the headers at first, and opens a file for each slice.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is not fp32, fp16 or bf16, or two files have the same
            tensor.
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
                    f"{file} is not a complete safetensors file ({error}); expected a complete file: copy it again"
                ) from None

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read. The result has the type of the file."""
        entry = self.entries[name]
        start, end, _ = slice(start, end).indices(math.prod(self.shapes[name]))
        numbers = torch.empty(end - start, dtype=entry.dtype)
        try:
            with open(entry.file, "rb") as stream:
                stream.seek(entry.offset + start * entry.dtype.itemsize)
                missing = numbers.nbytes - stream.readinto(numbers.view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(
                f"{entry.file} can no longer be read ({error.strerror}); start again with a complete copy"
            ) from None
        if missing:
            raise CheckpointError(
                f"{entry.file} ends inside tensor {name}; expected {missing} more bytes: copy it again"
            )
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
                raise ValueError(f"the data of tensor {name} does not have the size of its shape {list(shape)}")
            self.shapes[name], self.entries[name] = shape, Entry(file, 8 + length + start, dtype)

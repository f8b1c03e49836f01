"""Writes files of torch.save as a stream and reads them by slices, so that only one slice of a tensor is in memory.

    write(Path("model.pth"), {"weight": StreamedTensor(source, "name", torch.float32), "step": 7})
    source = InMemory(read(Path("model.pth")))

A file is an uncompressed zip archive with data.pkl, in which each tensor names a storage, and data/0, data/1, ..., the
storages. Files of torch's old format (before torch 1.6, or _use_new_zipfile_serialization=False) can be read but not
written. They are read as a whole, so they need as much memory as disk space.

Source: torch/serialization.py; for the padding, caffe2/serialize/inline_container.cc.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megamtp.checkpoint.safetensors_file import content
from megamtp.checkpoint.tensors import TensorSource
from megamtp.console import print_warning
from megamtp.errors import CheckpointError

ALIGNMENT = 64  # bytes; storages are aligned so that they can be memory-mapped
ROOT = "archive"
STORAGES = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage}
FILLER, ZIP64_FIELD_BYTES, LOCAL_HEADER_BYTES = b"FB", 20, 30


class StreamedTensor:
    """A placeholder for tensor `name` of `source` in content to write. Its numbers are read while they are written."""

    def __init__(self, source: TensorSource, name: str, dtype: torch.dtype):
        self.source, self.name, self.dtype = source, name, dtype
        self.shape = source.shapes[name]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (
            _Storage(self),
            0,
            self.shape,
            strides,
            False,
            collections.OrderedDict(),
        )


class _Storage:
    def __init__(self, tensor: StreamedTensor):
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    """Writes the same as torch's pickler, for tensors that are not in memory."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, protocol=2)
        self.tensors: list[StreamedTensor] = []

    def persistent_id(self, item: Any) -> tuple | None:
        if not isinstance(item, _Storage):
            return None
        self.tensors.append(item.tensor)
        number = str(len(self.tensors) - 1)
        return "storage", STORAGES[item.tensor.dtype], number, "cpu", item.tensor.num_elements


def write(path: Path, content_of_file: Any) -> None:
    """Saves dicts, lists and numbers, in which StreamedTensor takes the place of tensors. Raises OSError."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content_of_file)
    with open(path, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{ROOT}/data.pkl", pickled.getvalue())
        archive.writestr(f"{ROOT}/byteorder", "little")
        archive.writestr(f"{ROOT}/version", "3\n")
        for number, tensor in enumerate(pickler.tensors):
            entry = zipfile.ZipInfo(f"{ROOT}/data/{number}")
            entry.extra = _padding(stream.tell() + LOCAL_HEADER_BYTES + len(entry.filename) + ZIP64_FIELD_BYTES)
            with archive.open(entry, "w", force_zip64=True) as opened:
                for piece in content(tensor.source, tensor.name, tensor.dtype):
                    opened.write(piece)


def write_small(path: Path, content_of_file: Any) -> None:
    """Saves small content as torch.save does, but raises OSError if the disk is full."""
    saved = io.BytesIO()
    torch.save(content_of_file, saved)
    path.write_bytes(saved.getbuffer())


class Opaque:
    """A placeholder for an object of any class. Nothing of that class is imported or run."""

    def __init__(self, *_: Any):
        """Accepts and ignores the arguments of the object's constructor."""

    def __setstate__(self, state: Any) -> None:
        """Keeps the object's attributes."""
        if isinstance(state, dict):
            self.__dict__.update(state)


def read(path: Path, opaque: tuple[str, ...] = ()) -> Any:
    """Reads a file. Its tensors are memory-mapped, so they take no memory that the system cannot reclaim.

    A file of the old format is read into memory, after a warning.

    Args:
        opaque: prefixes of full class names. Objects of these classes become Opaque. In the old format, they are
            refused.

    Raises:
        CheckpointError: the file is missing or damaged, or it holds something other than tensors, numbers and
            containers of them, because unpickling other objects may run code.
    """
    try:
        can_be_mapped = zipfile.is_zipfile(path)
        unknown = get_unsafe_globals_in_checkpoint(path) if opaque and can_be_mapped else []
        allowed: list[Callable | tuple[Callable, str]] = [
            (_opaque_class(name), name) for name in unknown if name.startswith(opaque)
        ]
        with safe_globals(allowed):
            loaded = torch.load(path, map_location="cpu", mmap=can_be_mapped, weights_only=True)
        num_bytes = path.stat().st_size
    except Exception as error:  # damaged pickles raise errors of any kind
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read ({reason}); expected a complete file of torch.save: copy it again"
        ) from None
    if not can_be_mapped:
        print_warning(
            f"{path} is in torch's old format, which is read as a whole: it takes {num_bytes:,} bytes of memory"
        )
    return loaded


def require_tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    """Returns `loaded` unchanged, after checking that it maps names to dense floating-point tensors.

    Raises:
        CheckpointError: it does not. The message names the file `path`.
    """
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected a mapping of names to tensors")
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is of type {type(tensor).__name__}, expected a tensor")
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{path}: {name} is a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}; expected a dense "
                "tensor of floating-point numbers"
            )
    return loaded


def _opaque_class(name: str) -> type:
    """Returns a new subclass of Opaque for each name, because torch distinguishes allowed classes by identity."""
    return type(name.rpartition(".")[2], (Opaque,), {})


def _padding(offset: int) -> bytes:
    """Returns an extra field of the zip format that moves data from `offset` to a multiple of ALIGNMENT."""
    size = -(offset + 4) % ALIGNMENT
    return FILLER + struct.pack("<H", size) + b"Z" * size

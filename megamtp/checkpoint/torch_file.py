"""Files of torch.save, written as a stream and read by slice: of a tensor, no more than a slice is ever in memory.

Files of torch's old format (before torch 1.6, or _use_new_zipfile_serialization=False) are only read, and as a whole:
they take as much memory as disk for as long as they are in use.

    write(Path("model.pth"), {"weight": Streamed(source, "name", torch.float32), "step": 7})
    source = InMemory(read(Path("model.pth")))

A file of today's format is an uncompressed zip archive: data.pkl, in which each tensor names a storage, and data/0,
data/1, ..., the storages.
Source: torch/serialization.py, and caffe2/serialize/inline_container.cc for the padding.
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

ALIGNMENT = 64  # bytes: a storage begins at a multiple, so that it can be mapped
ROOT = "archive"
STORAGES = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage}
FILLER, ZIP64_FIELD_BYTES, LOCAL_HEADER_BYTES = b"FB", 20, 30


class Streamed:
    """Stands for tensor `name` of `source` in what is written; its numbers are read when their turn comes."""

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
    def __init__(self, tensor: Streamed):
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    """Writes what torch's own would, for tensors that are not in memory."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, protocol=2)
        self.tensors: list[Streamed] = []

    def persistent_id(self, item: Any) -> tuple | None:
        if not isinstance(item, _Storage):
            return None
        self.tensors.append(item.tensor)
        number = str(len(self.tensors) - 1)
        return "storage", STORAGES[item.tensor.dtype], number, "cpu", item.tensor.num_elements


def write(path: Path, content_of_file: Any) -> None:
    """Saves dicts, lists and numbers, with Streamed where tensors are to be. Raises OSError."""
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
                for part in content(tensor.source, tensor.name, tensor.dtype):
                    opened.write(part)


def write_small(path: Path, content_of_file: Any) -> None:
    """torch.save, but a full disk is OSError."""
    saved = io.BytesIO()
    torch.save(content_of_file, saved)
    path.write_bytes(saved.getbuffer())


class Opaque:
    """Stands for an object that is not looked at; nothing of its class is imported or run."""

    def __init__(self, *_: Any):
        """Takes what the object was made from."""

    def __setstate__(self, state: Any) -> None:
        """Keeps attributes, which are all that there is to see."""
        if isinstance(state, dict):
            self.__dict__.update(state)


def read(path: Path, opaque: tuple[str, ...] = ()) -> Any:
    """What is in the file, its tensors mapped: they take no memory until they are read, and none that must be kept
    then.

    A file of the old format is read into memory, which a warning says.

    Args:
        opaque: objects of classes whose full names begin so become Opaque; not in the old format, where they are
            refused.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors, numbers and their containers, which
            might run a program.
    """
    try:
        can_be_mapped = zipfile.is_zipfile(path)
        unknown = get_unsafe_globals_in_checkpoint(path) if opaque and can_be_mapped else []
        allowed: list[Callable | tuple[Callable, str]] = [
            (_stand_in(name), name) for name in unknown if name.startswith(opaque)
        ]
        with safe_globals(allowed):
            found = torch.load(path, map_location="cpu", mmap=can_be_mapped, weights_only=True)
        num_bytes = path.stat().st_size
    except Exception as error:  # damaged pickles raise errors of any kind
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read ({reason}); expected a whole file of torch.save: copy it again"
        ) from None
    if not can_be_mapped:
        print_warning(
            f"{path} is in torch's old format, which cannot be read in parts: it takes {num_bytes:,} bytes of memory"
        )
    return found


def tensors_of(path: Path, found: Any) -> dict[str, Tensor]:
    """`found`, read from `path`, after checking that it is a mapping of names to floating-point tensors. Raises
    CheckpointError.
    """
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected a mapping of names to tensors")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is of type {type(tensor).__name__}, expected a tensor")
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{path}: {name} is a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}; expected a dense "
                "one of floating-point numbers"
            )
    return found


def _stand_in(name: str) -> type:
    """A class of its own for each name, for the reader knows classes by their identity."""
    return type(name.rpartition(".")[2], (Opaque,), {})


def _padding(offset: int) -> bytes:
    """The extra field after which data that would begin at `offset` begins at a multiple of ALIGNMENT."""
    size = -(offset + 4) % ALIGNMENT
    return FILLER + struct.pack("<H", size) + b"Z" * size

"""The tensors of a checkpoint: safetensors files, one from each rank, that hold slices of the model's tensors.

    weight/trunk.0.mlp.up.weight@4096       elements 4096, ... of that parameter's row-major numbers, fp32
    exp_avg/trunk.0.mlp.up.weight@4096      of a tensor of the optimizer: AdamW's first moment
    exp_avg_sq/trunk.0.mlp.up.weight@4096   of its second

Where a slice begins and ends is up to the engine that wrote it; together they are every element of every tensor, once. The metadata
of a file have the whole shapes of its tensors. Nothing here reads or writes more than a slice at a time.
"""

import contextlib
import json
import math
import os
import sys
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamtp.checkpoint.safetensors_file import encode_header
from megamtp.checkpoint.tensors import TensorSource
from megamtp.errors import CheckpointError

SHAPES = "shapes"  # in the metadata: JSON of name -> whole shape
CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class WrittenFile:
    """What a manifest says of a file. `crc32`: zlib's."""

    bytes: int
    crc32: int


def shard_name(rank: int) -> str:
    """The file of a rank."""
    return f"shard-{rank:05d}.safetensors"


def slice_key(kind: str, name: str, start: int) -> str:
    """How a file names the slice of tensor `name` that begins at element `start`."""
    return f"{kind}/{name}@{start}"


def write_shard(path: Path, slices: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> WrittenFile:
    """Writes one file, and waits until it is on disk.

    Args:
        slices: one-dimensional, fp32 or bytes, by slice_key (other keys are allowed, and left alone by Tensors); read in order, a
            chunk at a time.
        shapes: the whole tensors', by name; at least of those that `slices` are of.

    Raises:
        OSError: as when the disk is full.
    """
    sizes = {key: math.prod(shape) for key, shape in slices.shapes.items()}
    tensors = {key: (slices.read(key, 0, 1).dtype, (size,)) for key, size in sizes.items()}
    header = encode_header(tensors, {SHAPES: json.dumps(shapes)})
    total, crc = 0, 0
    with open(path, "wb", buffering=0) as stream:
        for part in _parts(header, slices, sizes):
            view = memoryview(part)
            while view:
                view = view[stream.write(view) :]
            total, crc = total + len(part), zlib.crc32(part, crc)
        os.fsync(stream.fileno())
    return WrittenFile(total, crc)


def _parts(header: bytes, slices: TensorSource, sizes: dict[str, int]) -> Iterator[bytes | memoryview]:
    yield header
    for key, size in sizes.items():
        for start in range(0, size, CHUNK_BYTES // 4):
            chunk = slices.read(key, start, min(size, start + CHUNK_BYTES // 4))
            yield chunk.contiguous().view(torch.uint8).numpy().data


def read_crc32(path: Path) -> int:
    """Of a whole file, read in chunks. Raises OSError."""
    crc = 0
    with open(path, "rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


@dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    file: Path
    key: str
    opened: safe_open


class Shards:
    """A checkpoint's files, each opened once for the tensors of all kinds. Reads are memory-mapped.

    Attributes:
        shapes: of every tensor, by name.
    """

    def __init__(self, checkpoint: Path, files: Iterable[str]):
        """`files`: their names, which the manifest has: whatever else lies there is no part of the checkpoint.

        Raises:
            CheckpointError: a file cannot be read.
        """
        self._checkpoint = checkpoint
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, dict[str, list[_Piece]]] = {}  # by kind and name
        for name in files:
            self._index(checkpoint / name)

    def tensors(self, kind: str) -> "Tensors":
        """Those of one kind.

        Raises:
            CheckpointError: slices are missing or overlap.
        """
        pieces = {name: sorted(found, key=lambda piece: piece.start) for name, found in self._pieces.get(kind, {}).items()}
        for name, shape in self.shapes.items():
            self._check_complete(kind, name, math.prod(shape), pieces.get(name, []))
        return Tensors(self._checkpoint, self.shapes, pieces)

    def part(self, kind: str) -> "Tensors":
        """Those of one kind as far as the files have them: to read anything else raises a CheckpointError."""
        return Tensors(self._checkpoint, self.shapes, self._pieces.get(kind, {}))

    def _index(self, file: Path) -> None:
        try:
            opened = safe_open(file, framework="pt")
            self.shapes |= {name: tuple(shape) for name, shape in json.loads(opened.metadata()[SHAPES]).items()}
            for key in opened.keys():  # noqa: SIM118 - no mapping
                kind, _, place = key.partition("/")
                if "@" in place:  # other keys are random states
                    name, start = place.rsplit("@", 1)
                    (size,) = opened.get_slice(key).get_shape()
                    piece = _Piece(int(start), int(start) + size, file, key, opened)
                    self._pieces.setdefault(kind, {}).setdefault(name, []).append(piece)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _damaged(file, error) from None

    def _check_complete(self, kind: str, name: str, size: int, pieces: list[_Piece]) -> None:
        bounds = [(piece.start, piece.end) for piece in pieces]
        ends = [0, *(end for _, end in bounds)]
        if [start for start, _ in bounds] != ends[:-1] or ends[-1] != size:
            raise CheckpointError(
                f"{self._checkpoint}: {kind} of {name} is there in slices {bounds}, expected all of its {size} elements, once; "
                "remove it to go on from an older one"
            )


class Tensors:
    """One kind of a checkpoint's tensors, whole, whatever engine cut them into slices: a TensorSource, from Shards.tensors.

    Attributes:
        shapes: of every tensor, by name.
    """

    def __init__(self, checkpoint: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[str, list[_Piece]]):
        self._checkpoint, self.shapes, self._pieces = checkpoint, shapes, pieces

    def has(self, name: str, start: int, end: int) -> bool:
        """Whether elements `start` to before `end` are there."""
        return sum(last - first for _, first, last in self._parts(name, start, end)) == end - start

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read."""
        if name not in self.shapes:
            raise CheckpointError(f"{self._checkpoint} has no tensor {name}; remove it to go on from an older one")
        end = math.prod(self.shapes[name]) if end is None else end
        result, found = torch.empty(end - start), 0
        for piece, first, last in self._parts(name, start, end):
            try:
                result[first - start : last - start] = piece.opened.get_slice(piece.key)[first - piece.start : last - piece.start]
            except SafetensorError as error:
                raise _damaged(piece.file, error) from None
            found += last - first
        if found != end - start:
            raise CheckpointError(
                f"{self._checkpoint} lacks elements of {name} from {start} to {end}; remove it to go on from an older one"
            )
        return result

    def _parts(self, name: str, start: int, end: int) -> Iterator[tuple[_Piece, int, int]]:
        """(piece, first, last) for each piece with elements `first` to before `last` of those from `start` to before `end`."""
        for piece in self._pieces.get(name, []):
            first, last = max(start, piece.start), min(end, piece.end)
            if first < last:
                yield piece, first, last


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is damaged ({error}); remove {file.parent} to go on from an older one")


class Snapshot:
    """A copy in CPU memory of tensors that training goes on changing, in one buffer that is used again by the next copy.

    The buffer is page-locked where tensors come from a GPU, so that they come at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies, and returns when all is there; what the last call returned is overwritten."""
        offsets, end = {}, 0
        for key, tensor in tensors.items():
            offsets[key] = end
            end += -(-tensor.numel() * tensor.element_size() // 16) * 16
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if self._buffer.numel() < end:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # frees the old memory first
            self._buffer = _page_locked(end) if on_gpu else torch.empty(end, dtype=torch.uint8)
        copies = {}
        for key, tensor in tensors.items():
            begin, size = offsets[key], tensor.numel() * tensor.element_size()
            copies[key] = self._buffer[begin : begin + size].view(tensor.dtype).view(tensor.shape)
            copies[key].copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


def _page_locked(size: int) -> Tensor:
    """Not torch's pin_memory, which rounds up to a power of two; pageable, after a warning, where the system refuses."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if not page_lock(buffer):
        print(
            f"megamtp: warning: {size:,} bytes cannot be page-locked: copies for checkpoints take longer; raise ulimit -l",
            file=sys.stderr,
        )
    return buffer


def page_lock(buffer: Tensor) -> bool:
    """Page-locks the buffer's memory until the buffer is freed. False if the system refuses.

    CUDA must be told before the memory is freed: otherwise it takes other tensors at that address for page-locked ones.
    """
    cudart = torch.cuda.cudart()
    if cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0) == cudart.cudaError.success:
        weakref.finalize(buffer, cudart.cudaHostUnregister, buffer.data_ptr()).atexit = False
        return True
    with contextlib.suppress(RuntimeError):  # the error stays with CUDA until somebody is told: better this kernel than a step's
        torch.zeros(1, device="cuda")
    return False

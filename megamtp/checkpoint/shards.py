"""The tensors of a checkpoint: each rank writes one safetensors file with slices of the model's tensors.

    weight/trunk.0.mlp.up.weight@4096       elements from 4096 on of the flattened parameter (row-major), fp32
    exp_avg/trunk.0.mlp.up.weight@4096      the same elements of AdamW's first moment
    exp_avg_sq/trunk.0.mlp.up.weight@4096   the same elements of AdamW's second moment

The engine that writes a checkpoint chooses the bounds of the slices. Together, the slices hold each element of each
tensor exactly once. The metadata of each file contain the shapes of the whole tensors. slices.json (slices.py) lists
which file holds which elements. Reading and writing never hold more than one slice in memory.
"""

import contextlib
import json
import math
import os
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamtp.checkpoint.safetensors_file import encode_header
from megamtp.checkpoint.slices import SLICES, WrittenFile
from megamtp.checkpoint.tensors import TensorSource
from megamtp.console import print_warning
from megamtp.errors import CheckpointError

SHAPES = "shapes"  # a key of the metadata; its value is JSON, {name: shape of the whole tensor}
CHUNK_BYTES = 32 * 2**20

Slices = dict[str, np.ndarray]  # keys are names, see _sorted


def shard_name(rank: int) -> str:
    """Returns the name of a rank's file."""
    return f"shard-{rank:05d}.safetensors"


def slice_key(kind: str, name: str, start: int) -> str:
    """Returns the key of the slice of tensor `name` that begins at element `start`."""
    return f"{kind}/{name}@{start}"


def write_shard(path: Path, slices: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> WrittenFile:
    """Writes a rank's file, and waits until it is on disk.

    Args:
        slices: one-dimensional tensors of fp32 or bytes, by slice_key. They are read in order, a chunk at a time.
            ShardedTensors ignores keys of another form.
        shapes: the shapes of the whole tensors, by name; at least of those in `slices`.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    sizes = {key: math.prod(shape) for key, shape in slices.shapes.items()}
    tensors = {key: (slices.read(key, 0, 1).dtype, (size,)) for key, size in sizes.items()}
    header = encode_header(tensors, {SHAPES: json.dumps(shapes)})
    total, crc = 0, 0
    with open(path, "wb", buffering=0) as stream:
        for piece in _pieces(header, slices, sizes):
            view = memoryview(piece)
            while view:
                view = view[stream.write(view) :]
            total, crc = total + len(piece), zlib.crc32(piece, crc)
        os.fsync(stream.fileno())
    return WrittenFile(total, crc)


def _pieces(header: bytes, slices: TensorSource, sizes: dict[str, int]) -> Iterator[bytes | memoryview]:
    yield header
    for key, size in sizes.items():
        for start in range(0, size, CHUNK_BYTES // 4):
            chunk = slices.read(key, start, min(size, start + CHUNK_BYTES // 4))
            yield chunk.contiguous().view(torch.uint8).numpy().data


def read_crc32(path: Path) -> int:
    """Returns the CRC-32 of a file, which is read in chunks. Raises OSError."""
    crc = 0
    with open(path, "rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


class Shards:
    """The files of a checkpoint. A file is memory-mapped when something in it is first read.

    Attributes:
        shapes: the shapes of all tensors, by name.
    """

    def __init__(self, checkpoint: Path, files: Iterable[str]):
        """Reads slices.json if it is among the files, and otherwise the headers of all files.

        Args:
            files: the names that the manifest lists. Other files in the folder are ignored.

        Raises:
            CheckpointError: a file cannot be read.
        """
        self._checkpoint, self._files = checkpoint, list(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._slices_of_all_kinds: Slices | None = None  # read from slices.json
        self._slices_by_kind: dict[str, dict[str, list[tuple[int, int, int]]]] = {}  # read from headers
        self._opened: dict[int, safe_open] = {}
        if SLICES in self._files:
            self._read_slices(checkpoint / SLICES)
        else:
            for number in range(len(self._files)):
                self._index(number)

    def tensors(self, kind: str) -> "ShardedTensors":
        """Returns all tensors of one kind.

        Raises:
            CheckpointError: slices are missing or overlap.
        """
        tensors = self.available_tensors(kind)
        for name in self.shapes:
            tensors.check_complete(name)
        return tensors

    def available_tensors(self, kind: str) -> "ShardedTensors":
        """Returns the tensors of one kind, of which elements may be missing. Reading those raises CheckpointError."""
        slices = self._slices_of_all_kinds
        if slices is None:
            slices = {name: _sorted(bounds) for name, bounds in self._slices_by_kind.get(kind, {}).items()}
        return ShardedTensors(self._checkpoint, kind, self.shapes, slices, self._open)

    def _open(self, number: int) -> tuple[Path, safe_open]:
        file = self._checkpoint / self._files[number]
        if number not in self._opened:
            try:
                self._opened[number] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _damaged(file, error) from None
        return file, self._opened[number]

    def _read_slices(self, file: Path) -> None:
        try:
            content = json.loads(file.read_bytes())
            self.shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
            self._files = list(map(str, content["files"]))
            self._slices_of_all_kinds = {name: _sorted(bounds) for name, bounds in content["slices"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise _damaged(file, error) from None

    def _index(self, number: int) -> None:
        file, opened = self._open(number)
        try:
            self.shapes |= {name: tuple(shape) for name, shape in json.loads(opened.metadata()[SHAPES]).items()}
            for key in opened.keys():  # noqa: SIM118 - safe_open is not iterable
                kind, _, slice_name = key.partition("/")
                if "@" in slice_name:  # other keys are random states
                    name, start = slice_name.rsplit("@", 1)
                    (size,) = opened.get_slice(key).get_shape()
                    bounds = number, int(start), int(start) + size
                    self._slices_by_kind.setdefault(kind, {}).setdefault(name, []).append(bounds)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _damaged(file, error) from None


def _sorted(slices: list[tuple[int, int, int]]) -> np.ndarray:
    """Returns int64 [slices, 3]: (index of the file, first element, end), sorted by first element."""
    bounds = np.array(slices, dtype=np.int64).reshape(-1, 3)
    return bounds[bounds[:, 1].argsort(kind="stable")]


class ShardedTensors:
    """A TensorSource over the slices of one kind of tensors. Shards.tensors creates it.

    Attributes:
        shapes: the shapes of all tensors, by name.
    """

    def __init__(
        self,
        checkpoint: Path,
        kind: str,
        shapes: Mapping[str, tuple[int, ...]],
        slices: Slices,
        open_file: Callable[[int], tuple[Path, safe_open]],
    ):
        self._checkpoint, self._kind, self.shapes = checkpoint, kind, shapes
        self._slices, self._open = slices, open_file

    def check_complete(self, name: str) -> None:
        """Raises CheckpointError if slices of the tensor are missing or overlap."""
        size, slices = math.prod(self.shapes[name]), self._slices.get(name, np.empty((0, 3), np.int64))
        starts, ends = slices[:, 1], np.concatenate(([0], slices[:, 2]))
        if not np.array_equal(starts, ends[:-1]) or ends[-1] != size:
            bounds = [tuple(pair) for pair in slices[:, 1:].tolist()]
            raise CheckpointError(
                f"{self._checkpoint}: {self._kind} of {name} has slices {bounds}, expected each of its {size} elements "
                "once; remove the checkpoint to resume from an older one"
            )

    def has(self, name: str, start: int, end: int) -> bool:
        """Returns whether all elements [start, end) are available."""
        return sum(last - first for *_, first, last in self._overlaps(name, start, end)) == end - start

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read."""
        if name not in self.shapes:
            raise CheckpointError(
                f"{self._checkpoint} has no tensor {name}; remove the checkpoint to resume from an older one"
            )
        end = math.prod(self.shapes[name]) if end is None else end
        result, num_read = torch.empty(end - start), 0
        for number, begin, first, last in self._overlaps(name, start, end):
            file, opened = self._open(number)
            try:
                whole_slice = opened.get_slice(slice_key(self._kind, name, begin))
                result[first - start : last - start] = whole_slice[first - begin : last - begin]
            except SafetensorError as error:
                raise _damaged(file, error) from None
            num_read += last - first
        if num_read != end - start:
            raise CheckpointError(
                f"{self._checkpoint} lacks elements of {name} from {start} to {end}; remove the checkpoint to resume "
                "from an older one"
            )
        return result

    def _overlaps(self, name: str, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yields (index of the file, first element of the slice, first, last) for each slice in [start, end).

        [first, last) are the elements of the slice that lie in [start, end).
        """
        slices = self._slices.get(name, np.empty((0, 3), np.int64))
        begin = max(0, int(np.searchsorted(slices[:, 1], start, side="right")) - 1)
        stop = int(np.searchsorted(slices[:, 1], end, side="left"))
        for number, slice_start, slice_end in slices[begin:stop].tolist():
            first, last = max(start, slice_start), min(end, slice_end)
            if first < last:
                yield number, slice_start, first, last


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is damaged ({error}); remove {file.parent} to resume from an older one")


class Snapshot:
    """A copy of tensors in CPU memory, so that training can continue while a checkpoint is written.

    All copies share one buffer, which the next snapshot reuses. It is page-locked for tensors on a GPU, because only
    page-locked memory is copied at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies the tensors, and waits until they have been copied. Overwrites the copies of the previous call."""
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
    """Returns a page-locked buffer, or, after a warning, a pageable buffer if the system refuses to lock it.

    torch's pin_memory is not used because it rounds sizes up to a power of two.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    if not page_lock(buffer):
        print_warning(f"{size:,} bytes cannot be page-locked: copies for checkpoints take longer; raise ulimit -l")
    return buffer


def page_lock(buffer: Tensor) -> bool:
    """Page-locks the buffer's memory until the buffer is freed. Returns False if the system refuses.

    The memory must be unregistered before it is freed. Otherwise, CUDA would treat other tensors at the same address as
    page-locked.
    """
    cudart = torch.cuda.cudart()
    if cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0) == cudart.cudaError.success:
        weakref.finalize(buffer, cudart.cudaHostUnregister, buffer.data_ptr()).atexit = False
        return True
    # CUDA reports the error again at the next kernel launch. Launch one here, so that no training step fails.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False

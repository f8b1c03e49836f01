"""The tensors of a checkpoint: safetensors files, one from each rank, that hold slices of the model's tensors.

    weight/trunk.0.mlp.up.weight@4096       elements 4096, ... of that parameter's row-major numbers, fp32
    exp_avg/trunk.0.mlp.up.weight@4096      of a tensor of the optimizer: AdamW's first moment
    exp_avg_sq/trunk.0.mlp.up.weight@4096   of its second

Where a slice begins and ends is up to the engine that wrote it; together they are every element of every tensor, once.
The metadata of a file have the whole shapes of its tensors. Nothing here reads or writes more than a slice at a time.

slices.json beside them (slices.py) says which file has which elements.
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

SHAPES = "shapes"  # in the metadata: JSON of name -> whole shape
CHUNK_BYTES = 32 * 2**20

Slices = dict[str, np.ndarray]  # by name, as _sorted makes them


def shard_name(rank: int) -> str:
    """The file of a rank."""
    return f"shard-{rank:05d}.safetensors"


def slice_key(kind: str, name: str, start: int) -> str:
    """How a file names the slice of tensor `name` that begins at element `start`."""
    return f"{kind}/{name}@{start}"


def write_shard(path: Path, slices: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> WrittenFile:
    """Writes one file, and waits until it is on disk.

    Args:
        slices: one-dimensional, fp32 or bytes, by slice_key (other keys are allowed, and left alone by Tensors); read
            in order, a chunk at a time.
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


class Shards:
    """A checkpoint's files, each opened at most once, when something in it is read. Reads are memory-mapped.

    Attributes:
        shapes: of every tensor, by name.
    """

    def __init__(self, checkpoint: Path, files: Iterable[str]):
        """`files`: their names, which the manifest has: whatever else lies there is no part of the checkpoint.

        Without slices.json among them, or for one file alone, the files' own headers say what they hold.

        Raises:
            CheckpointError: a file cannot be read.
        """
        self._checkpoint, self._files = checkpoint, list(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._of_all_kinds: Slices | None = None  # where slices.json says so
        self._of_kind: dict[str, dict[str, list[tuple[int, int, int]]]] = {}  # where headers say so
        self._opened: dict[int, safe_open] = {}
        if SLICES in self._files:
            self._read_slices(checkpoint / SLICES)
        else:
            for number in range(len(self._files)):
                self._index(number)

    def tensors(self, kind: str) -> "Tensors":
        """Those of one kind.

        Raises:
            CheckpointError: slices are missing or overlap.
        """
        found = self.part(kind)
        for name in self.shapes:
            found.check_complete(name)
        return found

    def part(self, kind: str) -> "Tensors":
        """Those of one kind as far as the files have them: to read anything else raises a CheckpointError."""
        slices = self._of_all_kinds
        if slices is None:
            slices = {name: _sorted(found) for name, found in self._of_kind.get(kind, {}).items()}
        return Tensors(self._checkpoint, kind, self.shapes, slices, self._open)

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
            self._of_all_kinds = {name: _sorted(found) for name, found in content["slices"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise _damaged(file, error) from None

    def _index(self, number: int) -> None:
        file, opened = self._open(number)
        try:
            self.shapes |= {name: tuple(shape) for name, shape in json.loads(opened.metadata()[SHAPES]).items()}
            for key in opened.keys():  # noqa: SIM118 - no mapping
                kind, _, place = key.partition("/")
                if "@" in place:  # other keys are random states
                    name, start = place.rsplit("@", 1)
                    (size,) = opened.get_slice(key).get_shape()
                    bounds = number, int(start), int(start) + size
                    self._of_kind.setdefault(kind, {}).setdefault(name, []).append(bounds)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _damaged(file, error) from None


def _sorted(slices: list[tuple[int, int, int]]) -> np.ndarray:
    """int64 [slices, 3]: index of the file, first element, end; by their first element."""
    found = np.array(slices, dtype=np.int64).reshape(-1, 3)
    return found[found[:, 1].argsort(kind="stable")]


class Tensors:
    """One kind of a checkpoint's tensors, whole, whatever engine cut them into slices: a TensorSource, from
    Shards.tensors.

    Attributes:
        shapes: of every tensor, by name.
    """

    def __init__(
        self,
        checkpoint: Path,
        kind: str,
        shapes: Mapping[str, tuple[int, ...]],
        slices: Slices,
        open_file: Callable[[int], tuple[Path, safe_open]],
    ):
        self._checkpoint, self._kind, self.shapes, self._slices, self._open = (
            checkpoint,
            kind,
            shapes,
            slices,
            open_file,
        )

    def check_complete(self, name: str) -> None:
        """Raises CheckpointError: slices of the tensor are missing or overlap."""
        size, slices = math.prod(self.shapes[name]), self._slices.get(name, np.empty((0, 3), np.int64))
        starts, ends = slices[:, 1], np.concatenate(([0], slices[:, 2]))
        if not np.array_equal(starts, ends[:-1]) or ends[-1] != size:
            bounds = [tuple(pair) for pair in slices[:, 1:].tolist()]
            raise CheckpointError(
                f"{self._checkpoint}: {self._kind} of {name} is there in slices {bounds}, expected all of its {size} "
                "elements, once; remove it to resume from an older one"
            )

    def has(self, name: str, start: int, end: int) -> bool:
        """Whether elements `start` to before `end` are there."""
        return sum(last - first for *_, first, last in self._parts(name, start, end)) == end - start

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read."""
        if name not in self.shapes:
            raise CheckpointError(f"{self._checkpoint} has no tensor {name}; remove it to resume from an older one")
        end = math.prod(self.shapes[name]) if end is None else end
        result, found = torch.empty(end - start), 0
        for number, begin, first, last in self._parts(name, start, end):
            file, opened = self._open(number)
            try:
                own = opened.get_slice(slice_key(self._kind, name, begin))
                result[first - start : last - start] = own[first - begin : last - begin]
            except SafetensorError as error:
                raise _damaged(file, error) from None
            found += last - first
        if found != end - start:
            raise CheckpointError(
                f"{self._checkpoint} lacks elements of {name} from {start} to {end}; remove it to resume from an older "
                "one"
            )
        return result

    def _parts(self, name: str, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(index of the file, first element of its slice, first, last) for each slice with elements `first` to before
        `last` of those from `start` to before `end`."""
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
    """A copy in CPU memory of tensors that training goes on changing, in one buffer that is used again by the next
    copy.

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
    """Not torch's pin_memory, which rounds up to a power of two; pageable, after a warning, where the system
    refuses.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    if not page_lock(buffer):
        print_warning(f"{size:,} bytes cannot be page-locked: copies for checkpoints take longer; raise ulimit -l")
    return buffer


def page_lock(buffer: Tensor) -> bool:
    """Page-locks the buffer's memory until the buffer is freed. False if the system refuses.

    CUDA must be told before the memory is freed: otherwise it takes other tensors at that address for page-locked ones.
    """
    cudart = torch.cuda.cudart()
    if cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0) == cudart.cudaError.success:
        weakref.finalize(buffer, cudart.cudaHostUnregister, buffer.data_ptr()).atexit = False
        return True
    # the error stays with CUDA until somebody is told: better this kernel than a step's
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False

"""Sharded checkpoints: reading slices across files, detection of damage, and memory use."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamtp.checkpoint import shards
from megamtp.checkpoint.shards import ShardedTensors, Shards, Snapshot, read_crc32, shard_name, slice_key, write_shard
from megamtp.checkpoint.slices import SLICES, file_slices, write_slices
from megamtp.checkpoint.tensors import InMemory, read_tensor
from megamtp.errors import CheckpointError

MATRIX = torch.arange(60.0).view(6, 10)
VECTOR = torch.tensor([0.5, -0.0, math.inf, 1e-45])
SHAPES = {"matrix": (6, 10), "vector": (4,)}


def write(folder: Path, *cuts: dict[str, torch.Tensor]) -> None:
    for rank, slices in enumerate(cuts):
        write_shard(folder / shard_name(rank), InMemory(slices), SHAPES)


def open_all(folder: Path, kind: str = "weight") -> ShardedTensors:
    """Opens all files in the folder."""
    return Shards(folder, sorted(path.name for path in folder.iterdir())).tensors(kind)


def cut(tensor: torch.Tensor, name: str, start: int, end: int, kind: str = "weight") -> dict[str, torch.Tensor]:
    return {slice_key(kind, name, start): tensor.flatten()[start:end].contiguous()}


@pytest.mark.parametrize("chunk_bytes", [4, 12, shards.CHUNK_BYTES])
def test_slices_with_any_bounds_are_read_across_files(chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", chunk_bytes)
    random = {"random/cpu": torch.arange(3, dtype=torch.uint8)}
    write(
        tmp_path,
        cut(MATRIX, "matrix", 40, 60) | cut(VECTOR, "vector", 0, 4) | random,
        cut(MATRIX, "matrix", 0, 17) | random,
        cut(MATRIX, "matrix", 17, 40)
        | cut(MATRIX * 2, "matrix", 0, 60, "exp_avg")
        | cut(VECTOR, "vector", 0, 4, "exp_avg"),
    )
    tensors = open_all(tmp_path)
    assert tensors.shapes == SHAPES
    assert torch.equal(read_tensor(tensors, "matrix"), MATRIX)
    assert torch.equal(read_tensor(tensors, "vector").view(torch.int32), VECTOR.view(torch.int32))
    for start in range(61):
        for end in range(start, 61):
            assert torch.equal(tensors.read("matrix", start, end), MATRIX.flatten()[start:end])
    assert torch.equal(read_tensor(open_all(tmp_path, "exp_avg"), "matrix"), MATRIX * 2)


def test_files_are_ordinary_safetensors_files(tmp_path):
    slices = cut(MATRIX, "matrix", 0, 60) | cut(VECTOR, "vector", 0, 4)
    written = write_shard(tmp_path / shard_name(0), InMemory(slices), SHAPES)
    loaded = load_file(tmp_path / shard_name(0))
    assert loaded.keys() == slices.keys() and all(torch.equal(loaded[key], slices[key]) for key in slices)
    assert written.bytes == (tmp_path / shard_name(0)).stat().st_size
    assert written.crc32 == read_crc32(tmp_path / shard_name(0))


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        ([(0, 20), (30, 60)], ["weight of matrix", "(30, 60)", "each of its 60 elements"]),
        ([(0, 20), (10, 60)], ["weight of matrix", "(10, 60)", "once"]),
        ([(0, 59)], ["weight of matrix", "(0, 59)"]),
        ([], ["weight of matrix", "[]"]),
    ],
)
def test_missing_and_overlapping_slices_are_refused(cuts, words, tmp_path):
    slices = cut(VECTOR, "vector", 0, 4)
    for start, end in cuts:
        slices |= cut(MATRIX, "matrix", start, end)
    write(tmp_path, slices)
    with pytest.raises(CheckpointError) as error:
        open_all(tmp_path)
    for word in words:
        assert word in str(error.value)


def test_available_elements_of_incomplete_tensors(tmp_path):
    write(tmp_path, cut(MATRIX, "matrix", 10, 30) | cut(MATRIX, "matrix", 30, 40), cut(MATRIX, "matrix", 0, 10))
    tensors = Shards(tmp_path, [shard_name(0)]).available_tensors("weight")
    assert tensors.has("matrix", 10, 40) and tensors.has("matrix", 12, 33)
    assert not tensors.has("matrix", 9, 40) and not tensors.has("matrix", 10, 41) and not tensors.has("vector", 0, 1)
    assert torch.equal(tensors.read("matrix", 12, 33), MATRIX.flatten()[12:33])
    with pytest.raises(CheckpointError, match="lacks elements of matrix from 9 to 12"):
        tensors.read("matrix", 9, 12)


def test_files_that_the_manifest_does_not_list_are_ignored(tmp_path):
    """A job with more ranks may have left such files if it was killed while it saved the same step."""
    write(tmp_path, cut(MATRIX, "matrix", 0, 60) | cut(VECTOR, "vector", 0, 4), cut(MATRIX * 2, "matrix", 30, 60))
    assert torch.equal(read_tensor(Shards(tmp_path, [shard_name(0)]).tensors("weight"), "matrix"), MATRIX)
    with pytest.raises(CheckpointError, match="once"):
        open_all(tmp_path)


def test_files_are_opened_once_for_all_kinds(tmp_path, monkeypatch):
    paths, safe_open = [], shards.safe_open
    monkeypatch.setattr(shards, "safe_open", lambda path, **options: paths.append(path) or safe_open(path, **options))
    slices = {}
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        slices |= cut(MATRIX, "matrix", 0, 60, kind) | cut(VECTOR, "vector", 0, 4, kind)
    write(tmp_path, slices, {})
    files = Shards(tmp_path, [shard_name(0), shard_name(1)])
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(read_tensor(files.tensors(kind), "matrix"), MATRIX)
    assert paths == [tmp_path / shard_name(0), tmp_path / shard_name(1)]


def test_rank_opens_only_the_files_that_it_needs(tmp_path, monkeypatch):
    """slices.json lists the files; the tensors equal those that are read from the headers of all files."""
    cuts = [{}, {}, {}]
    for kind, factor in (("weight", 1), ("exp_avg", 2)):
        for rank, (start, end) in enumerate([(0, 17), (17, 40), (40, 60)]):
            cuts[rank] |= cut(MATRIX * factor, "matrix", start, end, kind)
        cuts[1] |= cut(VECTOR, "vector", 0, 4, kind)
    cuts[0]["random/cpu"] = torch.zeros(3, dtype=torch.uint8)
    write(tmp_path, *cuts)
    files = [shard_name(rank) for rank in range(3)]
    headers = Shards(tmp_path, files)
    slices_of_files = {name: file_slices(InMemory(slices), SHAPES) for name, slices in zip(files, cuts, strict=True)}
    written = write_slices(tmp_path / SLICES, slices_of_files)
    assert (written.bytes, written.crc32) == ((tmp_path / SLICES).stat().st_size, read_crc32(tmp_path / SLICES))
    paths, safe_open = [], shards.safe_open
    monkeypatch.setattr(
        shards, "safe_open", lambda path, **options: paths.append(path.name) or safe_open(path, **options)
    )
    indexed = Shards(tmp_path, [*files, SLICES])
    weights, moments = indexed.tensors("weight"), indexed.tensors("exp_avg")
    assert indexed.shapes == SHAPES and paths == []
    assert torch.equal(weights.read("matrix", 20, 38), MATRIX.flatten()[20:38]) and paths == [files[1]]
    assert torch.equal(moments.read("matrix", 38, 45), 2 * MATRIX.flatten()[38:45]) and paths == files[1:]
    for kind in ("weight", "exp_avg"):
        for name in SHAPES:
            assert torch.equal(read_tensor(indexed.tensors(kind), name), read_tensor(headers.tensors(kind), name))
    assert sorted(paths) == files
    with pytest.raises(CheckpointError, match="is damaged"):
        read_tensor(indexed.tensors("exp_avg_sq"), "matrix")
    for content in (b"", b"[]", b'{"shapes": {}, "files": [], "slices": {"matrix": [["a"]]}}'):
        (tmp_path / SLICES).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"slices\.json is damaged"):
            Shards(tmp_path, [*files, SLICES])


def test_damaged_file_and_unknown_tensor_are_refused(tmp_path):
    (tmp_path / shard_name(0)).write_bytes(b"something else altogether")
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors is damaged"):
        open_all(tmp_path)
    write(tmp_path, cut(MATRIX, "matrix", 0, 60) | cut(VECTOR, "vector", 0, 4))
    with pytest.raises(CheckpointError, match="no tensor other"):
        open_all(tmp_path).read("other")


def test_snapshot_copies_tensors_and_reuses_its_memory():
    snapshot, tensors = Snapshot(), {"a": torch.arange(5.0), "b": torch.arange(3, dtype=torch.uint8)}
    first = snapshot.copy(tensors)
    addresses = {key: copy.data_ptr() for key, copy in first.items()}
    tensors["a"] += 1
    assert first["a"].tolist() == [0, 1, 2, 3, 4] and first["b"].tolist() == [0, 1, 2]
    second = snapshot.copy(tensors)
    assert second["a"].tolist() == [1, 2, 3, 4, 5] and second["b"].dtype == torch.uint8
    assert {key: copy.data_ptr() for key, copy in second.items()} == addresses


MEMORY_PROGRAM = """
import sys, threading, time, torch
from pathlib import Path
from megamtp.checkpoint.shards import Shards, shard_name, slice_key, write_shard

SIZE = 300 * 2**20 // 4
peak, done = 0, threading.Event()

def anonymous():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
    return int(fields["RssAnon"].split()[0]) // 1024

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

class Numbers:
    shapes = {slice_key("weight", "flat", 0): (SIZE,)}
    def read(self, key, start=0, end=None):
        return torch.arange(start, end, dtype=torch.float32)

torch.arange(10.0).sum()
base = anonymous()
threading.Thread(target=watch).start()
folder = Path(sys.argv[1])
write_shard(folder / shard_name(0), Numbers(), {"flat": (SIZE,)})
tensors = Shards(folder, [shard_name(0)]).tensors("weight")
for start in range(0, SIZE, 2**20):
    numbers = tensors.read("flat", start, min(SIZE, start + 2**20))
    assert numbers[0] == start and numbers[-1] == torch.tensor(float(start + len(numbers) - 1))
done.set()
print(peak - base)
"""


def test_writing_and_reading_a_large_tensor_takes_little_memory(tmp_path):
    """A tensor of 300 MiB, in chunks of 32 MiB, takes less than 150 MiB of anonymous memory."""
    command, root = [sys.executable, "-c", MEMORY_PROGRAM, str(tmp_path)], Path(__file__).parents[3]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert int(finished.stdout) < 150

"""Checkpoint folders: atomic publication, removal of old checkpoints, and detection of damage."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamtp.checkpoint import store
from megamtp.checkpoint.shards import WrittenFile, read_crc32
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

ROOT = Path(__file__).parents[3]
MODEL = ModelConfig(dim=8, num_layers=2, num_future_tokens=1, num_attention_heads=1, vocab_size=10)


def write(run: Path, step: int, content: bytes = b"weights") -> tuple[Path, store.Manifest, dict[str, WrittenFile]]:
    """Writes a checkpoint that is not published yet. Returns the arguments of store.publish."""
    checkpoint = store.checkpoint_path(run, step)
    folder = store.partial_path(checkpoint)
    folder.mkdir(parents=True)
    files = {}
    for name in ("shard-0", "shard-1"):
        (folder / name).write_bytes(content)
        files[name] = WrittenFile(len(content), read_crc32(folder / name))
    return checkpoint, store.Manifest(step, 2, "zero3", "fp32", dataclasses.asdict(MODEL), {"adam_steps": step}), files


def publish(run: Path, step: int, content: bytes = b"weights") -> Path:
    checkpoint, *rest = write(run, step, content)
    store.publish(checkpoint, *rest)
    return checkpoint


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_checkpoints_are_ordered_by_step(tmp_path):
    for step in (10_000_000, 9, 9_999_999):
        publish(tmp_path, step)
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000009", "step-9999999", "step-10000000"]
    assert store.newest_checkpoint(tmp_path).name == "step-10000000"
    manifest = store.verify(store.newest_checkpoint(tmp_path))
    assert (manifest.step, manifest.state, manifest.file_bytes) == (10_000_000, {"adam_steps": 10_000_000}, 14)


@pytest.mark.parametrize(
    ("keep", "every", "kept"),
    [
        (2, None, [50, 60, 90]),
        (1, None, [60, 90]),
        (1, 20, [20, 40, 60, 90]),
        (2, 30, [30, 50, 60, 90]),
        (9, None, None),
    ],
)
def test_newest_checkpoints_and_multiples_are_kept(keep, every, kept, tmp_path):
    """The run is at step 60, so it has resumed from an older checkpoint than that of step 90, which must be damaged.

    That checkpoint neither counts as one of the newest nor is removed.
    """
    steps = [10, 20, 30, 40, 50, 60, 90]
    for step in steps:
        publish(tmp_path, step)
    for checkpoint in store.find_outdated(tmp_path, 60, keep, every):
        store.remove(checkpoint)
    assert names(tmp_path) == [f"step-{step:07d}" for step in kept or steps]


def test_checkpoint_that_is_not_published_is_ignored_and_removed(tmp_path):
    publish(tmp_path, 1)
    write(tmp_path, 2)
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000001"]
    store.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-0000001"]


def test_leftovers_that_cannot_be_removed_are_returned(tmp_path):
    write(tmp_path, 2)
    kept = tmp_path / "checkpoints/step-0000003.partial"
    kept.write_text("a file, not a folder")
    assert store.remove_leftovers(tmp_path) == [kept]
    assert names(tmp_path) == [kept.name]


def test_files_are_synced_before_and_folders_after_the_rename(tmp_path, monkeypatch):
    checkpoint, *rest = write(tmp_path, 1)
    partial, calls, rename = store.partial_path(checkpoint), [], store.os.rename
    monkeypatch.setattr(store, "fsync", calls.append)
    monkeypatch.setattr(store.os, "rename", lambda *paths: calls.append(paths) or rename(*paths))
    store.publish(checkpoint, *rest)
    assert calls == [partial / store.MANIFEST, partial, (partial, checkpoint), tmp_path / "checkpoints", tmp_path]


@pytest.mark.parametrize("kind", ["truncated", "missing"])
def test_incomplete_checkpoint_is_not_published(kind, tmp_path):
    """This happens if a node does not share the run directory with the other nodes."""
    checkpoint, *rest = write(tmp_path, 1)
    damage(store.partial_path(checkpoint), kind)
    with pytest.raises(CheckpointError, match=r"shard-1 .*, expected 7 bytes; let all nodes share"):
        store.publish(checkpoint, *rest)
    assert store.checkpoints(tmp_path) == []


def test_interrupted_removal_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoint = publish(tmp_path, 1)

    def killed(*arguments, **options):
        if not options:
            raise KeyboardInterrupt

    monkeypatch.setattr(store.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.remove(checkpoint)
    monkeypatch.undo()
    assert store.checkpoints(tmp_path) == []
    store.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    publish(tmp_path, 1)
    publish(tmp_path, 1, content=b"other weights")
    assert names(tmp_path) == ["step-0000001"]
    assert store.verify(store.newest_checkpoint(tmp_path)).file_bytes == 26


KILLED = """
import sys
from pathlib import Path
from megamtp.checkpoint import store
from tests.kills import killed_at_each_line
from tests.unit.checkpoint import test_store

run, sizes, rest = Path(sys.argv[1]), [], []

def prepare():
    store.remove_leftovers(run)
    test_store.publish(run, 1)
    rest[:] = test_store.write(run, 1, b"other weights")

store.fsync = lambda path: None  # slow, and a killed process loses no written data
lines_of = ("megamtp/checkpoint/store.py", "megamtp/files.py")
for kill in killed_at_each_line(lines_of, prepare, lambda: store.publish(*rest)):
    sizes.append(store.verify(store.newest_checkpoint(run)).file_bytes)
    store.remove_leftovers(run)
    assert test_store.names(run) == ["step-0000001"]
assert sizes[0] == 14 and sizes[-1] == 26 and sizes == sorted(sizes), sizes
"""


def test_killed_replacement_leaves_the_old_or_the_new_checkpoint(tmp_path):
    finished = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def damage(checkpoint: Path, kind: str) -> None:
    file, manifest = checkpoint / "shard-1", checkpoint / store.MANIFEST
    match kind:
        case "truncated":
            file.write_bytes(b"weig")
        case "missing":
            file.unlink()
        case "flipped bit":
            flip(file, 3)
        case "no manifest":
            manifest.unlink()
        case "truncated manifest":
            manifest.write_text(manifest.read_text()[:-20])
        case "manifest with missing keys":
            manifest.write_text('{"format_version": 2, "step": 1}')
        case "changed number in the manifest":
            manifest.write_text(manifest.read_text().replace('"adam_steps": 1', '"adam_steps": 3'))
        case "list":
            manifest.write_text("[]")
        case _:
            raise ValueError(kind)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", ["shard-1 has 4 bytes", "expected 7"]),
        ("missing", ["shard-1 is missing", "expected 7"]),
        ("flipped bit", ["shard-1 has the checksum", "expected"]),
        ("no manifest", ["not a checkpoint", "manifest.json"]),
        ("truncated manifest", ["manifest.json cannot be read"]),
        ("manifest with missing keys", ["manifest.json cannot be read", "crc32"]),
        ("changed number in the manifest", ["manifest.json cannot be read", "its checksum is"]),
        ("list", ["manifest.json cannot be read"]),
    ],
)
def test_damage_is_reported_in_one_line(kind, words, tmp_path):
    """The remedy depends on whether the run can resume from an older checkpoint."""
    publish(tmp_path, 2)
    checkpoint = publish(tmp_path, 1)
    damage(checkpoint, kind)
    with pytest.raises(CheckpointError) as without_older:
        store.verify(checkpoint)
    publish(tmp_path, 0)
    with pytest.raises(CheckpointError) as with_older:
        store.verify(checkpoint)
    problem = str(without_older.value).removesuffix("; restore it, or train in another run.directory")
    assert str(with_older.value) == f"{problem}; remove {checkpoint} to resume from an older one"
    assert "\n" not in problem
    for word in words:
        assert word in problem


def test_file_whose_size_cannot_be_read_counts_as_damaged(tmp_path):
    """Here, its name is too long. Network file systems fail for many reasons."""
    checkpoint = publish(tmp_path, 1)
    content = dataclasses.asdict(store.read_manifest(checkpoint)) | {"files": {"x" * 300: {"bytes": 1, "crc32": 0}}}
    (checkpoint / store.MANIFEST).write_text(json.dumps(content | {"crc32": store._crc32(content)}))
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read \(.*name too long"):
        store.read_manifest(checkpoint)


def test_flipped_bit_in_any_byte_is_detected(tmp_path):
    checkpoint = publish(tmp_path, 1)
    for file in checkpoint.iterdir():
        for offset in range(file.stat().st_size):
            flip(file, offset)
            try:
                store.verify(checkpoint)
            except CheckpointError:
                pass
            else:  # the changed JSON must have the same meaning
                assert file.name == store.MANIFEST and json.loads(file.read_text())["step"] == 1
            flip(file, offset)
    assert store.verify(checkpoint).step == 1


def test_ranks_divide_the_files_among_them(tmp_path):
    checkpoint = publish(tmp_path, 1)
    manifest = store.read_manifest(checkpoint)
    flip(checkpoint / "shard-1", 0)
    assert store.find_damage(checkpoint, manifest, 0, 2) is None
    assert "shard-1 has the checksum" in store.find_damage(checkpoint, manifest, 1, 2)
    assert store.find_damage(checkpoint, manifest, 2, 3) is None


def test_rank_can_skip_the_check_of_files(tmp_path):
    checkpoint = publish(tmp_path, 1)
    (checkpoint / "shard-1").unlink()
    assert store.read_manifest(checkpoint, check_files=False).step == 1
    with pytest.raises(CheckpointError, match="shard-1 is missing"):
        store.read_manifest(checkpoint)


def test_run_without_checkpoint_is_refused(tmp_path):
    assert store.checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint; expected"):
        store.newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("version", "words"),
    [(3, ["format 3", "by megamtp 9.9", "install a newer"]), (None, ["format 1", "expected format 2"])],
)
def test_another_format_version_is_refused(version, words, tmp_path):
    checkpoint = publish(tmp_path, 1)
    content = json.loads((checkpoint / store.MANIFEST).read_text()) | {"format_version": version, "code_version": "9.9"}
    if version is None:
        del content["format_version"]
    (checkpoint / store.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(store.FormatError) as error:
        store.read_manifest(checkpoint)
    for word in words:
        assert word in str(error.value)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoint = publish(tmp_path, 1)
    manifest = store.read_manifest(checkpoint)
    store.check_trained_model(checkpoint, manifest, MODEL)
    with pytest.raises(CheckpointError, match=r"model\.dim=8, expected 16"):
        store.check_trained_model(checkpoint, manifest, dataclasses.replace(MODEL, dim=16))
